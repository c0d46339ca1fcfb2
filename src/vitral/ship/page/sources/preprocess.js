// From a decoded picture to the pixels that the model sees, byte for byte those of `vitral predict`.
//
// `images/preprocess.py: Preprocess` in the browser, with Pillow's own arithmetic: coefficients in float64, rounded
// to integers of 22 bits, sums of integers, bytes between the two passes. A canvas differs by up to 33 levels, and
// ONNX's Resize by up to 2, in one value of 5,000 (docs/page.md).

const BITS = 22;

const FILTERS = {
  bilinear: { support: 1, at: (x) => Math.max(1 - Math.abs(x), 0) },
  bicubic: { support: 2, at: (x) => cubic(Math.abs(x), -0.5) },
  lanczos: { support: 3, at: (x) => (x >= -3 && x < 3 ? sinc(x) * sinc(x / 3) : 0) },
};

function cubic(x, a) {
  if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
  return x < 2 ? (((x - 5) * x + 8) * x - 4) * a : 0;
}

const sinc = (x) => (x === 0 ? 1 : Math.sin(x * Math.PI) / (x * Math.PI));

/** Python's `round`: a half goes to the even number. */
function roundEven(value) {
  const floor = Math.floor(value);
  const part = value - floor;
  if (part !== 0.5) return part < 0.5 ? floor : floor + 1;
  return floor % 2 ? floor + 1 : floor;
}

/** Which values make each new one, and how much: as `precompute_coeffs` of Pillow's Resample.c. */
function coefficients(side, size, { support, at }) {
  const scale = side / size;
  const stretch = Math.max(scale, 1);
  const reach = support * stretch;
  return Array.from({ length: size }, (_, index) => {
    const center = (index + 0.5) * scale;
    const first = Math.max(Math.trunc(center - reach + 0.5), 0);
    const count = Math.min(Math.trunc(center + reach + 0.5), side) - first;
    const weights = new Float64Array(count);
    let sum = 0;
    for (let tap = 0; tap < count; tap += 1) {
      weights[tap] = at((tap + first - center + 0.5) * (1 / stretch));
      sum += weights[tap];
    }
    const rounded = weights.map((weight) => {
      const share = (sum === 0 ? weight : weight / sum) * 2 ** BITS;
      return Math.trunc(share < 0 ? share - 0.5 : share + 0.5);
    });
    return { first, weights: Int32Array.from(rounded) };
  });
}

/** One pass: lines of `side` values, `stride` apart, become lines of `size`. `starts`: where each line begins. */
function pass(from, to, taps, channels, lines, place) {
  for (let line = 0; line < lines; line += 1) {
    const { start, stride, target, step } = place(line);
    for (let index = 0; index < taps.length; index += 1) {
      const { first, weights } = taps[index];
      for (let channel = 0; channel < channels; channel += 1) {
        let sum = 2 ** (BITS - 1);
        let at = start + first * stride + channel;
        for (let tap = 0; tap < weights.length; tap += 1, at += stride) sum += from[at] * weights[tap];
        to[target + index * step + channel] = clamp(Math.floor(sum / 2 ** BITS), 0, 255);
      }
    }
  }
}

const byRows = (image, height, filter) => {
  const { width, channels, data } = image;
  const made = new Uint8Array(height * width * channels);
  const stride = width * channels;
  pass(data, made, coefficients(image.height, height, filter), channels, width,
    (line) => ({ start: line * channels, stride, target: line * channels, step: stride }));
  return { ...image, height, data: made };
};

const byColumns = (image, width, filter) => {
  const { height, channels, data } = image;
  const made = new Uint8Array(height * width * channels);
  pass(data, made, coefficients(image.width, width, filter), channels, height,
    (line) => ({ start: line * image.width * channels, stride: channels, target: line * width * channels, step: channels }));
  return { ...image, width, data: made };
};

/** Pillow's nearest: places are found by adding steps. */
function nearest(image, height, width) {
  const places = (side, size) => {
    const step = side / size;
    let at = step * 0.5;
    return Array.from({ length: size }, (_, index) => Math.trunc(index ? (at += step) : at));
  };
  const [rows, columns] = [places(image.height, height), places(image.width, width)];
  const { channels } = image;
  const data = new Uint8Array(height * width * channels);
  let to = 0;
  for (const row of rows) {
    for (const column of columns) {
      const at = (row * image.width + column) * channels;
      for (let channel = 0; channel < channels; channel += 1) data[to++] = image.data[at + channel];
    }
  }
  return { ...image, height, width, data };
}

/** `Image.resize` of Pillow; from its version 13 on rows may come first (`rowsFirst`). */
function resize(image, [height, width], interpolation, rowsFirst) {
  if (interpolation === "nearest") return nearest(image, height, width);
  const filter = FILTERS[interpolation];
  const [fewer, narrower] = [image.height - height, image.width - width];
  const rows = (of) => (of.height === height ? of : byRows(of, height, filter));
  const columns = (of) => (of.width === width ? of : byColumns(of, width, filter));
  return rowsFirst && fewer > 0 && fewer > 2 * narrower ? columns(rows(image)) : rows(columns(image));
}

/** Grey as Pillow's "L", one channel; or all three. */
function inChannels({ width, height, data }, channels) {
  if (channels === 3) return { width, height, channels, data };
  const grey = new Uint8Array(width * height);
  for (let pixel = 0, at = 0; pixel < grey.length; pixel += 1, at += 3) {
    grey[pixel] = (data[at] * 19595 + data[at + 1] * 38470 + data[at + 2] * 7471 + 0x8000) >> 16;
  }
  return { width, height, channels, data: grey };
}

/** Rows and columns to which a picture is resized before its centre is cut out, as `Preprocess` has it. */
function resizedSize(preprocess, height, width) {
  const target = preprocess.img_size.map((side) => Math.floor(side / preprocess.crop_fraction + 1e-6));
  if (preprocess.resize === "squash") return target;
  if (preprocess.resize === "shortest" && target[0] === target[1]) {
    return [height, width].map((side) => Math.floor((side * target[0]) / Math.min(height, width)));
  }
  const ratios = [height / target[0], width / target[1]];
  const ratio = preprocess.resize === "longest" ? Math.max(...ratios) : Math.min(...ratios);
  return [height / ratio, width / ratio].map((side) => Math.max(roundEven(side), 1));
}

/** What the model sees of a decoded picture: {width, height, data}, RGB bytes of its size. */
function seenBy(preprocess, decoded, name) {
  const [tall, wide] = resizedSize(preprocess, decoded.height, decoded.width);
  const [height, width] = preprocess.img_size;
  // A line of 1x100,000 would be made 22 million pixels wide.
  if (tall * wide > Math.max(16e6, 64 * height * width)) {
    throw new Refusal(`${name} is too narrow to be resized, ${decoded.width}x${decoded.height} pixels`);
  }
  const channels = preprocess.mean.length;
  const image = resize(inChannels(decoded, channels), [tall, wide], preprocess.interpolation, preprocess.rows_first);
  const offset = (excess) => -(preprocess.crop_rounding === "even" && excess > 0 ? roundEven : Math.trunc)(excess / 2);
  return { width, height, data: placed(image, offset(tall - height), offset(wide - width), preprocess) };
}

/** The picture with its corner at a place of a canvas of the mean colour: cut, or padded. */
function placed(image, top, left, preprocess) {
  const [height, width] = preprocess.img_size;
  const fill = fillOf(preprocess);
  const data = new Uint8Array(height * width * 3);
  for (let y = 0, to = 0; y < height; y += 1) {
    for (let x = 0; x < width; x += 1, to += 3) {
      const [row, column] = [y - top, x - left];
      const inside = row >= 0 && column >= 0 && row < image.height && column < image.width;
      const at = (row * image.width + column) * image.channels;
      for (let channel = 0; channel < 3; channel += 1) {
        data[to + channel] = inside ? image.data[at + (image.channels === 3 ? channel : 0)] : fill[channel];
      }
    }
  }
  return data;
}

/** The mean colour that the model was trained around, RGB of 8 bits. */
function fillOf(preprocess) {
  const mean = preprocess.mean.length === 1 ? Array(3).fill(preprocess.mean[0]) : preprocess.mean;
  return mean.map((share) => roundEven(255 * share));
}
