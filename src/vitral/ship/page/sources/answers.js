// What the model says of the picture: a headline, and a bar for each label.

const SHOWN = 5;
const PRESENT = 0.5; // from which on a multi-label model says that a label is there

class Answers {
  constructor(description) {
    this.description = description;
  }

  /** The one sentence, for eyes and for screen readers. */
  headline({ top, abstained }) {
    if (abstained) return "Not sure";
    if (!this.description.multi_label) return top[0].label;
    const there = top.filter(({ probability }) => probability >= PRESENT).map(({ label }) => label);
    return there.length ? there.join(", ") : "None of its labels";
  }

  note({ top, abstained }) {
    const { multi_label: several, abstain_below: below } = this.description;
    if (abstained) return `No label reaches ${percent(below)}, below which this model gives no answer. The likeliest is ${top[0].label}, ${percent(top[0].probability)}.`;
    if (several) return `Every label is answered for itself; it is there from ${percent(PRESENT)} on.`;
    return `${percent(top[0].probability)} likely.`;
  }

  spoken(name, answer) {
    const { label, probability } = answer.top[0];
    if (answer.abstained) return `${name}: not sure. The likeliest is ${label}, ${percent(probability)}.`;
    if (this.description.multi_label) return `${name}: ${this.headline(answer)}.`;
    return `${name}: ${label}, ${percent(probability)}.`;
  }

  show(answer) {
    byId("headline").textContent = this.headline(answer);
    byId("headline").classList.toggle("unsure", answer.abstained);
    byId("verdict-note").textContent = this.note(answer);
    const there = this.description.multi_label ? answer.top.filter(({ probability }) => probability >= PRESENT).length : 0;
    const rows = answer.top.slice(0, Math.max(SHOWN, Math.min(there, 20)));
    byId("bars").replaceChildren(...rows.map((row, index) => this.bar(row, index, answer)));
  }

  bar({ label, probability }, index, answer) {
    const fill = make("span", { className: "fill" });
    fill.style.width = `${Math.max(100 * probability, 0.4)}%`;
    const groove = make("span", { className: "groove" }, fill);
    groove.setAttribute("aria-hidden", "true");
    const threshold = this.description.multi_label ? PRESENT : this.description.abstain_below;
    if (threshold !== null) groove.append(this.tick(threshold));
    const strong = this.description.multi_label ? probability >= PRESENT : index === 0 && !answer.abstained;
    const row = make("li", { className: strong ? "strong" : "" },
      make("span", { className: "label" }, label), make("span", { className: "share" }, percent(probability)), groove);
    row.dataset.probability = probability;
    return row;
  }

  /** Where on the bar the model begins to answer. */
  tick(threshold) {
    const tick = make("span", { className: "tick" });
    tick.style.left = `${100 * threshold}%`;
    return tick;
  }
}
