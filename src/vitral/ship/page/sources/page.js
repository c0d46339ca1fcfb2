// The page: pictures in a strip, the one that is looked at in the window, and its answers beside it.

class Page {
  constructor(about, engine) {
    Object.assign(this, { about, engine, items: [], current: null, working: false });
  }

  async start() {
    this.glass = new Glass(byId("window"), byId("floor"));
    try {
      this.description = await this.engine.open((line) => this.state("waiting", `Opening: ${line} …`));
      this.describe();
      await this.check();
    } catch (error) {
      this.state("failed", "This model cannot be used");
      this.complain(error);
      return;
    }
    this.answers = new Answers(this.description);
    this.looking = new Looking(this.glass, this.description);
    this.comparison = new Comparison(this.engine, this.description, this.looking, (error) => this.complain(error));
    this.invite();
    this.intake = new Intake((files) => this.add(files));
    document.body.classList.add("ready");
    byId("example").addEventListener("click", () => this.add([this.golden()]));
    for (const id of ["choose", "photograph", "example"]) byId(id).disabled = false;
  }

  golden() {
    return new File([fromBase64(byId("golden-picture").textContent)], "golden picture", { type: "image/png" });
  }

  // --- What it is ----------------------------------------------------------------------------------

  describe() {
    const { name, labels, engine, parameters, img_size: size, licence, temperature, multi_label: several } = this.description;
    document.title = `${name}: Vitral`;
    byId("model-name").textContent = name;
    const facts = [
      ["Computed", `${this.engine.where}; ${engine}`],
      ["Sees", `${size[1]} by ${size[0]} pixels`],
      ["Knows", `${labels.length.toLocaleString("en")} labels${several ? ", any number in a picture" : ""}: ${labels.slice(0, 12).join(", ")}${labels.length > 12 ? ", …" : ""}`],
      ["Parameters", parameters.toLocaleString("en")],
      ["Temperature", temperature === 1 ? "1: its probabilities were not calibrated" : `${temperature.toFixed(3)}, fitted on held-out images`],
      ["Licence of the weights", licence ?? "not stated"],
    ];
    byId("facts").replaceChildren(...facts.flatMap(([term, fact]) => [make("dt", {}, term), make("dd", {}, fact)]));
  }

  async check() {
    const { passed, line } = await this.engine.check();
    this.state(passed ? "passed" : "failed", line);
    if (!passed) this.complain(new Refusal("this page does not answer as the exported model did; do not trust its answers"));
  }

  state(kind, line) {
    byId("state").className = `state ${kind}`;
    byId("state").textContent = line;
  }

  /** Until a picture is there, the window shows the golden one, unlit. */
  async invite() {
    const pixels = await this.invitation();
    if (this.current || !pixels) return;
    this.glass.show(pixels, this.description.grid);
    this.glass.shine(new Float32Array(this.glass.colours.length).fill(0.5));
  }

  async invitation() {
    const golden = this.golden();
    return seenBy(this.about.preprocess ?? this.engine.preprocess, await decode(golden), golden.name);
  }

  // --- Pictures ------------------------------------------------------------------------------------

  add(files) {
    this.complain(null);
    const items = files.map((blob) => this.item(blob));
    this.items.push(...items);
    this.chooseNext = items[0];
    return this.work();
  }

  item(blob) {
    const item = { blob, name: blob.name || "pasted picture", seen: null, error: null };
    const picture = make("img", { src: URL.createObjectURL(blob), alt: "", loading: "lazy" });
    item.line = make("span", {}, "waiting …");
    item.button = make("button", { type: "button", title: item.name }, picture, item.line);
    item.button.addEventListener("click", () => this.select(item));
    byId("strip").append(make("li", {}, item.button));
    byId("strip").hidden = false;
    return item;
  }

  /** Answers what waits, one picture after another. */
  async work() {
    if (this.working) return;
    this.working = true;
    for (let item; (item = this.items.find(({ seen, error }) => !seen && !error)); ) {
      await breathe();
      try {
        item.seen = await this.engine.see(item.blob);
        item.line.textContent = this.answers.headline(item.seen.answer);
      } catch (error) {
        item.error = error;
        item.line.textContent = "no picture";
        item.button.classList.add("failed");
      }
      if (item === this.chooseNext) await this.select(item);
    }
    this.working = false;
  }

  async select(item) {
    if (item.error) return this.complain(item.error);
    if (!item.seen) return null;
    this.complain(null);
    this.current = item;
    for (const { button } of this.items) button.setAttribute("aria-current", String(button === item.button));
    document.body.classList.add("answered");
    this.glass.show(item.seen.pixels, this.description.grid);
    this.answers.show(item.seen.answer);
    this.comparison.show(item.seen);
    this.looking.show(item.seen, null);
    byId("said").textContent = this.answers.spoken(item.name, item.seen.answer);
    byId("window").setAttribute("aria-label", `Stained-glass window of ${item.name}, ${this.description.grid.join(" by ")} panes`);
    return this.description.attention ? this.lookAt(item) : null;
  }

  async lookAt(item) {
    try {
      const attention = await this.engine.attention(item.seen);
      if (item === this.current) this.looking.show(item.seen, attention);
    } catch (error) {
      this.complain(error);
    }
  }

  complain(error) {
    byId("error").hidden = !error;
    byId("error").textContent = error ? lineOf(error) : "";
  }
}

function startPage(engineOf) {
  const about = JSON.parse(byId("about").textContent);
  const engine = engineOf(about);
  const page = new Page(about, engine);
  // The page's door for scripts: `await vitral.started`, then `await vitral.see(file)`.
  globalThis.vitral = { started: page.start(), see: (blob) => engine.see(blob), page };
}
