// Who looks at what: the window's panes and roundels ask, layer and head are chosen by sliders, light answers.

class Looking {
  constructor(glass, description) {
    Object.assign(this, { glass, description, attention: null, pinned: null, hovered: null, compared: null });
    this.layer = description.layers - 1;
    this.head = ALL_HEADS;
    if (!description.attention) return;
    byId("look").hidden = false;
    this.buildRoundels();
    this.listenToSliders();
    this.listenToWindow();
  }

  /** Another picture: nothing is asked yet. */
  show(seen, attention) {
    Object.assign(this, { seen, attention, pinned: null, hovered: null, compared: null });
    this.refresh();
  }

  /** Shows values of a comparison in the place of attention, until a pane is asked again. */
  showCompared(values) {
    const most = Math.max(...values.map(Math.abs), 1e-12);
    this.compared = values.map((value) => Math.sign(value) * (Math.abs(value) / most) ** 0.75);
    this.pinned = null;
    this.refresh();
  }

  // --- Controls ------------------------------------------------------------------------------------

  buildRoundels() {
    const { prefix_tokens: prefix, prefix_names: names } = this.description;
    const roundels = [...Array(prefix).keys()].map((token) => [token, names?.[token] ?? (token ? `token ${token + 1}` : "class token")]);
    roundels.push([ALL_PANES, "all panes"]);
    byId("roundels").replaceChildren(...roundels.map(([token, name]) => {
      const button = make("button", { type: "button", className: "roundel" }, make("i"), name);
      button.setAttribute("aria-pressed", "false");
      button.dataset.token = token;
      button.addEventListener("click", () => this.pin(this.pinned === token ? null : token, true));
      button.addEventListener("pointerenter", (event) => event.pointerType === "mouse" && this.hover(token));
      button.addEventListener("pointerleave", () => this.hover(null));
      return button;
    }));
  }

  listenToSliders() {
    const [layer, head] = [byId("layer"), byId("head")];
    Object.assign(layer, { max: this.description.layers, value: this.description.layers });
    Object.assign(head, { max: this.description.heads, value: 0 });
    const moved = () => {
      this.layer = Number(layer.value) - 1;
      this.head = Number(head.value) - 1;
      this.nameSliders();
      if (this.query === null) this.pinned = this.description.prefix_tokens ? 0 : ALL_PANES;
      this.compared = null;
      this.refresh(true);
    };
    layer.addEventListener("input", moved);
    head.addEventListener("input", moved);
    this.nameSliders();
  }

  nameSliders() {
    const { layers, heads } = this.description;
    const layer = `${this.layer + 1} of ${layers}`;
    const head = this.head === ALL_HEADS ? `mean of ${heads}` : `${this.head + 1} of ${heads}`;
    byId("layer-value").textContent = layer;
    byId("head-value").textContent = head;
    byId("layer").setAttribute("aria-valuetext", layer);
    byId("head").setAttribute("aria-valuetext", head);
  }

  listenToWindow() {
    const canvas = byId("window");
    canvas.addEventListener("pointermove", (event) => event.pointerType === "mouse" && this.hover(this.tokenAt(event)));
    canvas.addEventListener("pointerleave", () => this.hover(null));
    canvas.addEventListener("click", (event) => {
      const token = this.tokenAt(event);
      this.pin(token === this.pinned ? null : token, true);
    });
    canvas.addEventListener("keydown", (event) => this.key(event));
  }

  tokenAt(event) {
    const pane = this.glass.paneAt(event.offsetX, event.offsetY);
    return pane === null || !this.attention ? null : pane + this.description.prefix_tokens;
  }

  key(event) {
    const { grid: [rows, columns], prefix_tokens: prefix } = this.description;
    const pane = this.pinned !== null && this.pinned >= prefix ? this.pinned - prefix : null;
    const [row, column] = pane === null
      ? [Math.floor(rows / 2), Math.floor(columns / 2)] : [Math.floor(pane / columns), pane % columns];
    const at = (y, x) => prefix + clamp(y, 0, rows - 1) * columns + clamp(x, 0, columns - 1);
    const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
    if (moves[event.key]) {
      const [down, right] = pane === null ? [0, 0] : moves[event.key];
      this.pin(at(row + down, column + right), true);
    } else if (event.key === "Home") this.pin(prefix ? 0 : ALL_PANES, true);
    else if (event.key === "Escape") this.pin(null, true);
    else if (event.key === "PageUp" || event.key === "PageDown") this.turnLayer(event.key === "PageUp" ? 1 : -1);
    else return;
    event.preventDefault();
  }

  turnLayer(step) {
    const slider = byId("layer");
    slider.value = clamp(Number(slider.value) + step, 1, this.description.layers);
    slider.dispatchEvent(new Event("input"));
  }

  // --- Light ---------------------------------------------------------------------------------------

  get query() {
    return this.hovered ?? this.pinned;
  }

  hover(token) {
    if (token === this.hovered || !this.attention) return;
    this.hovered = token;
    this.refresh();
  }

  pin(token, spoken = false) {
    if (!this.attention) return;
    this.pinned = token;
    this.hovered = null;
    this.compared = null;
    this.refresh(spoken);
  }

  refresh(spoken = false) {
    const asked = this.attention ? this.query : null;
    for (const button of document.querySelectorAll(".roundel")) {
      button.setAttribute("aria-pressed", String(Number(button.dataset.token) === this.pinned));
    }
    if (asked === null) this.restOrCompare();
    else this.lightRow(asked);
    if (spoken) byId("said").textContent = byId("readout").textContent;
  }

  restOrCompare() {
    this.lightRoundels(null);
    const { attention, grid: [rows, columns] } = this.description;
    if (this.compared) {
      this.glass.shine(this.compared, { signed: true });
      byId("readout").textContent = "Amber panes speak for the first label, blue panes against it.";
      return;
    }
    if (this.glass.picture) this.glass.rest();
    byId("readout").textContent = attention
      ? `What the model sees, in ${rows} by ${columns} panes. Touch a pane: light falls where it looks.`
      : `What the model sees, in ${rows} by ${columns} panes.`;
  }

  lightRow(token) {
    const { prefix_tokens: prefix } = this.description;
    const row = this.attention.row(this.layer, this.head, token);
    const panes = row.slice(prefix);
    const most = Math.max(...panes, 1e-12);
    this.glass.shine(panes.map((weight) => (weight / most) ** 0.65), { marked: token >= prefix ? token - prefix : null });
    this.lightRoundels(row);
    byId("readout").textContent = this.described(token, row, panes);
  }

  lightRoundels(row) {
    const { prefix_tokens: prefix } = this.description;
    const most = row ? Math.max(...row, 1e-12) : 1;
    for (const button of document.querySelectorAll(".roundel")) {
      const token = Number(button.dataset.token);
      const light = row && token !== ALL_PANES && token < prefix ? (row[token] / most) ** 0.65 : 0;
      button.firstElementChild.style.setProperty("--light", light.toFixed(3));
    }
  }

  described(token, row, panes) {
    const { grid: [, columns], prefix_tokens: prefix } = this.description;
    const place = (pane) => `row ${Math.floor(pane / columns) + 1}, column ${(pane % columns) + 1}`;
    const brightest = panes.indexOf(Math.max(...panes));
    const heads = this.head === ALL_HEADS ? `mean of ${this.description.heads} heads` : `head ${this.head + 1}`;
    const names = this.description.prefix_names ?? [];
    const who = token === ALL_PANES ? "The panes together look"
      : token < prefix ? `The ${names[token] ?? `token ${token + 1}`} looks` : `The pane in ${place(token - prefix)} looks`;
    const elsewhere = row.slice(0, prefix).reduce((sum, weight) => sum + weight, 0);
    const rest = prefix ? `; ${percent(elsewhere)} of it goes to ${prefix === 1 ? `the ${names[0] ?? "class token"}` : "tokens that are no panes"}` : "";
    return `Layer ${this.layer + 1}, ${heads}. ${who} most at ${place(brightest)}, ${percent(panes[brightest])}${rest}.`;
  }
}
