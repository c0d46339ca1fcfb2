// What every token looks at, in each layer and head: weights of 8 bits, scaled by the maximum of their row.

const ALL_HEADS = -1;
const ALL_PANES = -1; // the query "every pane alike": the mean of their rows

class Attention {
  /** @param of {layers, heads, grid: [rows, columns], prefix, weights: Uint8Array (layers, heads, T, T),
   *  maxima: Float32Array (layers, heads, T)} */
  constructor(of) {
    Object.assign(this, of);
    this.panes = of.grid[0] * of.grid[1];
    this.tokens = of.prefix + this.panes;
  }

  /** The weights by which a token mixes all tokens: (T), they sum to about 1. */
  row(layer, head, token) {
    const heads = head === ALL_HEADS ? [...Array(this.heads).keys()] : [head];
    const tokens = token === ALL_PANES ? [...Array(this.panes).keys()].map((pane) => pane + this.prefix) : [token];
    const sum = new Float32Array(this.tokens);
    for (const one of heads) {
      for (const query of tokens) this.add(sum, (layer * this.heads + one) * this.tokens + query);
    }
    return sum.map((weight) => weight / (heads.length * tokens.length));
  }

  add(sum, row) {
    const scale = this.maxima[row] / 255;
    const start = row * this.tokens;
    for (let token = 0; token < this.tokens; token += 1) sum[token] += this.weights[start + token] * scale;
  }
}
