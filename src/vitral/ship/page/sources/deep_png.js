// PNGs of 16 bits, which browsers round to 8 in another way than Vitral: grey is scaled, of colours the upper byte
// is taken. Interlaced ones, and those that are turned or have a transparent colour, are left to the browser.

const CHANNELS = { 0: 1, 2: 3, 4: 2, 6: 4 }; // of PNG's colour types
const PNG_SIGNATURE = [137, 80, 78, 71, 13, 10, 26, 10];

/** The picture as ImageData, not yet laid on white; null if the bytes are no such PNG. */
async function decodeDeepPng(blob) {
  const head = new Uint8Array(await blob.slice(0, 33).arrayBuffer());
  const view = new DataView(head.buffer);
  if (head.length < 33 || PNG_SIGNATURE.some((byte, index) => head[index] !== byte)) return null;
  const [width, height] = [view.getUint32(16), view.getUint32(20)];
  const channels = CHANNELS[head[25]];
  if (head[24] !== 16 || head[28] !== 0 || !channels || !width || !height || width * height > MOST_PIXELS) return null;
  const packed = imageChunks(new Uint8Array(await blob.arrayBuffer()));
  if (!packed) return null;
  const lines = await inflated(packed).catch(() => null);
  const stride = width * channels * 2;
  if (!lines || lines.length < height * (stride + 1)) return null; // cut off: the browser shows what there is
  return inEightBits(unfiltered(lines, height, stride, channels * 2), width, height, channels);
}

/** The parts of a PNG that hold its pixels; null if others change what is seen. */
function imageChunks(bytes) {
  const view = new DataView(bytes.buffer);
  const found = [];
  for (let at = 8; at + 12 <= bytes.length; ) {
    const length = view.getUint32(at);
    const name = String.fromCharCode(...bytes.subarray(at + 4, at + 8));
    if (name === "eXIf" || name === "tRNS" || name === "acTL") return null;
    if (name === "IDAT") found.push(bytes.subarray(at + 8, at + 8 + length));
    at += 12 + length;
  }
  return found;
}

async function inflated(parts) {
  const stream = new Blob(parts).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

/** PNG's five filters undone (its specification, section 9): lines of `stride` bytes, each after its filter's number. */
function unfiltered(lines, height, stride, step) {
  const bytes = new Uint8Array(height * stride);
  for (let row = 0; row < height; row += 1) {
    const filter = lines[row * (stride + 1)];
    const [from, to] = [row * (stride + 1) + 1, row * stride];
    for (let index = 0; index < stride; index += 1) {
      const left = index >= step ? bytes[to + index - step] : 0;
      const up = row ? bytes[to + index - stride] : 0;
      const corner = row && index >= step ? bytes[to + index - stride - step] : 0;
      bytes[to + index] = lines[from + index] + predicted(filter, left, up, corner);
    }
  }
  return bytes;
}

function predicted(filter, left, up, corner) {
  if (filter === 0) return 0;
  if (filter === 1) return left;
  if (filter === 2) return up;
  if (filter === 3) return (left + up) >> 1;
  const guess = left + up - corner;
  const [a, b, c] = [Math.abs(guess - left), Math.abs(guess - up), Math.abs(guess - corner)];
  if (a <= b && a <= c) return left;
  return b <= c ? up : corner;
}

function inEightBits(bytes, width, height, channels) {
  const image = new ImageData(width, height);
  const colours = channels > 2 ? [0, 1, 2] : [0, 0, 0];
  const of = (pixel, channel) => {
    const at = (pixel * channels + channel) * 2;
    return channels === 1 ? roundEven((bytes[at] * 256 + bytes[at + 1]) / 257) : bytes[at];
  };
  for (let pixel = 0; pixel < width * height; pixel += 1) {
    colours.forEach((channel, index) => { image.data[pixel * 4 + index] = of(pixel, channel); });
    image.data[pixel * 4 + 3] = channels % 2 ? 255 : of(pixel, channels - 1);
  }
  return image;
}
