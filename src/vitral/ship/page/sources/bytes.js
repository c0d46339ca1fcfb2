// What lies in the file itself as base64: the program that computes, the weights, the golden picture.

/** The text of a data block of this page; it is taken out, so that it is not held twice. */
function takeBlock(id) {
  const element = byId(id);
  if (!element) throw new Refusal(`this file has lost its part "${id}"; export it again`);
  const text = element.textContent.trim();
  element.remove();
  return text;
}

/** base64 -> Uint8Array. */
function fromBase64(text) {
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(text);
  const characters = atob(text);
  const bytes = new Uint8Array(characters.length);
  for (let index = 0; index < bytes.length; index += 1) bytes[index] = characters.charCodeAt(index);
  return bytes;
}

/** gzip -> Uint8Array, by the browser's own decompression. */
async function gunzip(bytes) {
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}
