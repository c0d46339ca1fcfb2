// From a file's bytes to the RGB that Vitral sees: upright, 8 bits, on white, in the file's own numbers.

const MOST_PIXELS = 50e6; // as the server: what one picture may cost

/**
 * Decodes a picture as `images/picture.py: open_image` does: no colour profile is applied, what is transparent
 * lies on white, and EXIF says which way is up.
 * @returns {{width, height, data}} data is RGB, a byte each
 */
async function decode(blob) {
  const name = blob.name || "the picture";
  if (!blob.size) throw new Refusal(`${name} is empty`);
  const bitmap = await createImageBitmap(blob, {
    colorSpaceConversion: "none", premultiplyAlpha: "none", imageOrientation: "from-image",
  }).catch(() => null);
  if (!bitmap) throw new Refusal(`${name} is no picture that this browser can read; give JPEG, PNG, WebP, AVIF or GIF`);
  const { width, height } = bitmap;
  if (width * height > MOST_PIXELS) {
    bitmap.close();
    throw new Refusal(`${name} has ${width}x${height} pixels, more than ${MOST_PIXELS / 1e6} million; make it smaller`);
  }
  const canvas = make("canvas", { width, height });
  const pen = canvas.getContext("2d", { willReadFrequently: true });
  pen.fillStyle = "white";
  pen.fillRect(0, 0, width, height);
  pen.drawImage(bitmap, 0, 0);
  bitmap.close();
  return { width, height, data: withoutAlpha(pen.getImageData(0, 0, width, height).data) };
}

function withoutAlpha(rgba) {
  const rgb = new Uint8Array((rgba.length / 4) * 3);
  for (let from = 0, to = 0; from < rgba.length; from += 4, to += 3) {
    rgb[to] = rgba[from];
    rgb[to + 1] = rgba[from + 1];
    rgb[to + 2] = rgba[from + 2];
  }
  return rgb;
}

/** RGB bytes as a canvas, to draw from. */
function asCanvas({ width, height, data }) {
  const image = new ImageData(width, height);
  for (let from = 0, to = 0; from < data.length; from += 3, to += 4) {
    image.data[to] = data[from];
    image.data[to + 1] = data[from + 1];
    image.data[to + 2] = data[from + 2];
    image.data[to + 3] = 255;
  }
  const canvas = make("canvas", { width, height });
  canvas.getContext("2d").putImageData(image, 0, 0);
  return canvas;
}

/** Rows and columns to which a picture is resized before its centre is cut out, as `Preprocess` has it. */
function resizedSize(preprocess, height, width) {
  const target = preprocess.img_size.map((side) => Math.floor(side / (preprocess.crop_fraction ?? 1) + 1e-6));
  if (preprocess.resize === "squash") return target;
  const ratios = [height / target[0], width / target[1]];
  const ratio = preprocess.resize === "longest" ? Math.max(...ratios) : Math.min(...ratios);
  return [height / ratio, width / ratio].map((side) => Math.max(Math.round(side), 1));
}

/** Raises where `Preprocess.resized` does: a line of 1x100,000 would be made 22 million pixels wide. */
function refuseTooNarrow(preprocess, { width, height }, name) {
  const [rows, columns] = resizedSize(preprocess, height, width);
  const most = Math.max(16e6, 64 * preprocess.img_size[0] * preprocess.img_size[1]);
  if (rows * columns > most) throw new Refusal(`${name} is too narrow to be resized, ${width}x${height} pixels`);
}

/**
 * About what the model sees, by the browser's own resize: to look at, never to compute with.
 */
function roughlySeen(preprocess, decoded) {
  const [height, width] = preprocess.img_size;
  const [rows, columns] = resizedSize(preprocess, decoded.height, decoded.width);
  const canvas = make("canvas", { width, height });
  const pen = canvas.getContext("2d", { willReadFrequently: true });
  pen.fillStyle = `rgb(${fillOf(preprocess)})`;
  pen.fillRect(0, 0, width, height);
  pen.imageSmoothingQuality = "high";
  pen.drawImage(asCanvas(decoded), Math.round((width - columns) / 2), Math.round((height - rows) / 2), columns, rows);
  return { width, height, data: withoutAlpha(pen.getImageData(0, 0, width, height).data) };
}

/** The mean colour that the model was trained around, RGB of 8 bits. */
function fillOf(preprocess) {
  const mean = preprocess.mean.length === 1 ? Array(3).fill(preprocess.mean[0]) : preprocess.mean;
  return mean.map((share) => Math.round(255 * share));
}
