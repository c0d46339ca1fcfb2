// How pictures come in: chosen, dropped, pasted, photographed, one after another.

class Intake {
  /** @param take is called with a list of files */
  constructor(take) {
    this.take = (files) => {
      const given = [...files].filter((file) => file.size || file.name);
      if (given.length) take(given);
    };
    for (const id of ["choose", "photograph"]) {
      byId(id).addEventListener("change", (event) => {
        this.take(event.target.files);
        event.target.value = ""; // so that the same file can be chosen again
      });
    }
    addEventListener("paste", (event) => this.take(event.clipboardData?.files ?? []));
    this.listenToDrops();
  }

  listenToDrops() {
    const over = (is) => document.body.classList.toggle("dropping", is);
    addEventListener("dragover", (event) => { event.preventDefault(); over(true); });
    addEventListener("dragleave", (event) => event.relatedTarget === null && over(false));
    addEventListener("drop", (event) => {
      event.preventDefault();
      over(false);
      this.take(event.dataTransfer?.files ?? []);
    });
  }
}
