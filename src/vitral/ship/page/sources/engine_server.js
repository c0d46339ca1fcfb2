// The engine of the server that gave this page: pictures are sent to it, and to nobody else.

const MOST_ANSWERS = 10; // labels that are asked for
// Of a server that does not say: for looking at pictures alone.
const USUAL = { resize: "shortest", crop_fraction: 1, interpolation: "bicubic", crop_rounding: "even", mean: [0.5, 0.5, 0.5] };

class ServerEngine {
  constructor(about) {
    this.about = about;
    this.kept = new Map(); // blob -> attention
    this.where = `on ${location.host}`;
    this.token = null;
  }

  async open(told) {
    told("asking the server");
    const found = await this.ask("GET", "v1/model");
    this.model = found;
    const [height, width] = [].concat(found.img_size, found.img_size);
    this.preprocess = { ...USUAL, ...found.preprocess, img_size: [height, width] };
    const explains = Boolean(found.explains && found.grid);
    return {
      name: found.name, labels: found.labels, multi_label: found.multi_label, abstain_below: found.abstain_below ?? null,
      parameters: found.parameters ?? 0, licence: found.licence ?? null, temperature: found.temperature ?? 1,
      layers: found.layers ?? 0, heads: found.heads ?? 0, grid: found.grid ?? this.guessedGrid(height, width),
      prefix_tokens: found.prefix_tokens ?? 0, prefix_names: found.prefix_names ?? null, img_size: [height, width],
      attention: explains, compares: explains ? "gradient" : null, engine: found.engine,
    };
  }

  /** For a model whose patches the server does not know, so that the window has panes. */
  guessedGrid(height, width) {
    const pane = Math.max(height, width) / 14;
    return [Math.max(Math.round(height / pane), 1), Math.max(Math.round(width / pane), 1)];
  }

  async ask(method, path, body = null) {
    const headers = body ? { "Content-Type": body.type || "application/octet-stream" } : {};
    if (this.token) headers.Authorization = `Bearer ${this.token}`;
    const answer = await fetch(path, { method, body, headers, cache: "no-store" }).catch(() => null);
    if (!answer) throw new Refusal("the server does not answer; is it still running?");
    if (answer.status === 401) {
      this.token = prompt("This server asks for its token:");
      if (this.token) return this.ask(method, path, body);
    }
    const content = await answer.json().catch(() => ({}));
    if (!answer.ok) throw new Refusal(content.error || `the server answered ${answer.status}`);
    return content;
  }

  async see(blob) {
    const asked = this.model.multi_label ? this.model.labels.length : MOST_ANSWERS;
    const top = Math.min(asked, this.model.labels.length, 100);
    const { predictions: [found] } = await this.ask("POST", `v1/predict?top=${top}`, blob);
    if (found.error) throw new Refusal(`${blob.name || "the picture"}: ${found.error}`);
    return { blob, pixels: await this.pixels(blob), answer: { top: found.top, abstained: found.abstained } };
  }

  /** What the model sees, to look at: the server prepares its own. */
  async pixels(blob) {
    const decoded = await decode(blob).catch(() => null);
    if (decoded) return seenBy(this.preprocess, decoded, blob.name || "the picture");
    const [height, width] = this.preprocess.img_size; // of a format that only the server reads
    const grey = { height, width, data: new Uint8Array(height * width * 3).fill(128) };
    return this.model.explains ? this.picturedByServer(blob).catch(() => grey) : grey;
  }

  async picturedByServer(blob) {
    const { picture } = await this.ask("POST", "v1/attention?layer=0", blob);
    return decode(new Blob([fromBase64(picture.split(",")[1])]));
  }

  async attention(seen) {
    if (!this.kept.has(seen.blob)) {
      const found = await this.ask("POST", "v1/attention", seen.blob);
      this.kept.set(seen.blob, new Attention({
        layers: found.layers, heads: found.heads, grid: found.grid, prefix: found.prefix_tokens,
        weights: fromBase64(found.weights),
        maxima: new Float32Array(fromBase64(found.maxima).slice().buffer),
      }));
      if (this.kept.size > 4) this.kept.delete(this.kept.keys().next().value);
    }
    return this.kept.get(seen.blob);
  }

  async compare(seen, { of, against, told }) {
    told(0.5);
    const query = new URLSearchParams({ class: of, ...(against === null ? {} : { against }) });
    const found = await this.ask("POST", `v1/explain?${query}`, seen.blob);
    return { values: Float32Array.from(found.values), method: found.method };
  }

  async check() {
    await this.ask("GET", "readyz");
    return { passed: true, line: "The server says that its model is ready" };
  }
}
