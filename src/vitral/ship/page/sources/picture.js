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
  const bitmap = await createImageBitmap((await decodeDeepPng(blob)) ?? blob, {
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
