// The engine within the file: ONNX Runtime Web computes the model in this page, and nothing leaves it.

const COVERED_AT_ONCE = 4; // pictures of one run while patches are covered
const SECONDS_TO_COMPARE = 12; // about so long may it take; then patches are covered by twos, threes, ...
const KEPT = 4; // pictures whose attention is kept; of others it is computed again

class WasmEngine {
  constructor(about) {
    this.about = about;
    this.kept = new Map();
    this.where = "in this page";
  }

  /** Unpacks the runtime and the weights. @param told gets a line for each step */
  async open(told) {
    told("unpacking the runtime");
    await breathe();
    ort.env.wasm.numThreads = 1;
    ort.env.wasm.wasmBinary = await gunzip(fromBase64(takeBlock("runtime-wasm")));
    const glue = new Blob([fromBase64(takeBlock("runtime-mjs"))], { type: "text/javascript" });
    ort.env.wasm.wasmPaths = { mjs: URL.createObjectURL(glue) };
    told("unpacking the weights");
    await breathe();
    this.model = await this.session("model");
    const looks = this.model.outputNames.includes("attention");
    const { about } = this;
    return {
      ...about.description, attention: looks, compares: "occlusion",
      engine: `ONNX Runtime Web ${ort.env.versions.web}, WebAssembly, one thread`,
    };
  }

  async session(name) {
    const bytes = fromBase64(takeBlock(name));
    try {
      return await ort.InferenceSession.create(bytes, { executionProviders: ["wasm"], logSeverityLevel: 3 });
    } catch (error) {
      throw new Refusal(`the model cannot be opened in this browser: ${lineOf(error)}`);
    }
  }

  /** What the model sees of a picture, and what it says. */
  async see(blob) {
    const seen = { blob, pixels: seenBy(this.about.preprocess, await decode(blob), blob.name || "the picture") };
    const answers = await this.run(seen);
    return { ...seen, ...answers, answer: this.answer(answers.probabilities) };
  }

  async run(seen) {
    const { width, height, data } = seen.pixels;
    const found = await this.model.run({ pixels: new ort.Tensor("uint8", data, [1, height, width, 3]) });
    if (found.attention) this.keep(seen.blob, found);
    return { logits: Array.from(found.logits.data), probabilities: Array.from(found.probabilities.data) };
  }

  keep(blob, { attention, maxima }) {
    const [layers, heads] = attention.dims;
    const { grid, prefix_tokens: prefix } = this.about.description;
    const weights = Uint8Array.from(attention.data);
    this.kept.delete(blob);
    this.kept.set(blob, new Attention({ layers, heads, grid, prefix, weights, maxima: Float32Array.from(maxima.data) }));
    if (this.kept.size > KEPT) this.kept.delete(this.kept.keys().next().value);
  }

  answer(probabilities) {
    const { labels, abstain_below: below } = this.about;
    const order = [...probabilities.keys()].sort((one, other) => probabilities[other] - probabilities[one]);
    const top = order.map((index) => ({ label: labels[index], probability: probabilities[index] }));
    return { top, abstained: below !== null && top[0].probability < below };
  }

  async attention(seen) {
    if (!this.kept.has(seen.blob)) await this.run(seen);
    return this.kept.get(seen.blob);
  }

  /**
   * What speaks for a label, against another: how far the difference of their logits falls when patches are
   * covered with the mean colour, a region of the grid at a time.
   */
  async compare(seen, { of, against, told, stopped }) {
    const { labels } = this.about;
    const [first, second] = [labels.indexOf(of), against === null ? null : labels.indexOf(against)];
    const score = (logits, start = 0) => logits[start + first] - (second === null ? 0 : logits[start + second]);
    const begin = performance.now();
    await this.run(seen);
    const regions = this.regions((performance.now() - begin) / 1000);
    const whole = score(seen.logits);
    const values = new Float32Array(this.about.description.grid[0] * this.about.description.grid[1]);
    for (let done = 0; done < regions.length; done += COVERED_AT_ONCE) {
      const some = regions.slice(done, done + COVERED_AT_ONCE);
      const logits = await this.covered(seen.pixels, some);
      some.forEach((panes, index) => panes.forEach((pane) => {
        values[pane] = whole - score(logits, index * labels.length);
      }));
      told((done + some.length) / regions.length);
      await breathe();
      if (stopped()) return null;
    }
    const each = regions[0].length === 1 ? "each pane" : `each of ${regions.length} groups of panes`;
    return { values, method: `occlusion: ${each} was covered with the mean colour, and the model was asked again` };
  }

  /** Panes that are covered together: single ones if the time suffices. */
  regions(seconds) {
    const [rows, columns] = this.about.description.grid;
    let side = 1;
    while (side < Math.max(rows, columns) && (Math.ceil(rows / side) * Math.ceil(columns / side)) * seconds > SECONDS_TO_COMPARE) side += 1;
    const regions = [];
    for (let row = 0; row < rows; row += side) {
      for (let column = 0; column < columns; column += side) {
        const panes = [];
        for (let y = row; y < Math.min(row + side, rows); y += 1) {
          for (let x = column; x < Math.min(column + side, columns); x += 1) panes.push(y * columns + x);
        }
        regions.push(panes);
      }
    }
    return regions;
  }

  async covered({ width, height, data }, regions) {
    const fill = fillOf(this.about.preprocess);
    const [rows, columns] = this.about.description.grid;
    const [tall, wide] = [height / rows, width / columns];
    const batch = new Uint8Array(regions.length * data.length);
    regions.forEach((panes, index) => {
      const start = index * data.length;
      batch.set(data, start);
      for (const pane of panes) {
        const [top, left] = [Math.floor(pane / columns) * tall, (pane % columns) * wide];
        for (let y = top; y < top + tall; y += 1) {
          for (let x = left; x < left + wide; x += 1) batch.set(fill, start + (y * width + x) * 3);
        }
      }
    });
    const pixels = new ort.Tensor("uint8", batch, [regions.length, height, width, 3]);
    return (await this.model.run({ pixels }, ["logits"])).logits.data;
  }

  /** Is this the model that was exported? The golden picture's pixels must be the same, its logits close. */
  async check() {
    const { golden } = this.about;
    const seen = await this.see(new File([fromBase64(byId("golden-picture").textContent)], "golden.png"));
    const expected = await gunzip(fromBase64(byId("golden-pixels").textContent));
    const wrong = seen.pixels.data.findIndex((value, index) => value !== expected[index]);
    if (wrong >= 0 || expected.length !== seen.pixels.data.length) {
      return { passed: false, line: "Golden check failed: the picture's pixels are not those of the export" };
    }
    const scale = Math.max(...golden.logits.map(Math.abs), 1e-12);
    const far = (name) => Math.max(...golden[name].map((value, index) => Math.abs(value - seen[name][index])));
    const [logits, probabilities] = [far("logits") / scale, far("probabilities")];
    const passed = logits <= golden.tolerance && probabilities <= golden.tolerance;
    const found = `logits within ${logits.toExponential(0)}, probabilities within ${probabilities.toExponential(0)}`;
    const line = passed
      ? `Golden check passed: pixels exact, ${found} of the export`
      : `Golden check failed: ${found}, and ${golden.tolerance} is allowed`;
    return { passed, line };
  }
}
