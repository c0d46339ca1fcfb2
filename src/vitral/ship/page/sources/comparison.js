// What in the picture speaks for one label, and what for another.

class Comparison {
  constructor(engine, description, looking, complain) {
    Object.assign(this, { engine, description, looking, complain, running: null });
    if (!description.compares) return;
    byId("compare").hidden = false;
    byId("compare-go").addEventListener("click", () => this.pressed());
    const options = description.labels.map((label) => make("option", { value: label }, label));
    byId("compare-of").replaceChildren(...options);
    const alone = make("option", { value: "" }, "nothing: its score alone");
    byId("compare-against").replaceChildren(alone, ...options.map((option) => option.cloneNode(true)));
  }

  /** Another picture: its two likeliest labels are proposed. */
  show(seen) {
    this.stop();
    this.seen = seen;
    byId("compare-method").textContent = "";
    if (!this.description.compares) return;
    const [first, second] = seen.answer.top;
    byId("compare-of").value = first.label;
    byId("compare-against").value = this.description.multi_label || !second ? "" : second.label;
  }

  stop() {
    this.running = null;
    byId("compare-go").textContent = "Compare";
    byId("compare-progress").hidden = true;
  }

  async pressed() {
    if (this.running) return this.stop();
    const [of, against] = [byId("compare-of").value, byId("compare-against").value || null];
    if (of === against) return this.complain(new Refusal("choose two labels that differ"));
    const run = (this.running = {});
    byId("compare-go").textContent = "Stop";
    Object.assign(byId("compare-progress"), { hidden: false, value: 0 });
    try {
      const told = (share) => { if (this.running === run) byId("compare-progress").value = share; };
      const found = await this.engine.compare(this.seen, { of, against, told, stopped: () => this.running !== run });
      if (found && this.running === run) this.tell(found, of, against);
    } catch (error) {
      this.complain(error);
    }
    if (this.running === run) this.stop();
    return null;
  }

  tell({ values, method }, of, against) {
    this.looking.showCompared(values);
    const other = against === null ? `blue panes against it` : `blue panes for ${against}`;
    const line = `Amber panes speak for ${of}, ${other}.`;
    byId("readout").textContent = line;
    byId("compare-method").textContent = `Found by ${method}.`;
    byId("said").textContent = line;
  }
}
