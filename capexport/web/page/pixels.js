/**
 * From an image file to the upright RGB pixels that capexport reads from it in Python, with Pillow.
 *
 * The browser decodes. Where its pixels differ from Pillow's, or may, a note says so, or the image
 * is refused.
 */
import { DAMAGED, readHeader } from "./header.js";
import { PROBES } from "./probes.js";

const MAX_BYTES = 200e6;
const MAX_PIXELS = 64e6; // a tab has less memory than Python; a phone's 50 megapixels pass
const MAX_ASPECT_RATIO = 100;
const TILE = 2048; // pixels: some browsers refuse larger canvases, and they take memory twice

/**
 * @param {Blob | ImageData | ImageBitmap} image
 * @returns {Promise<{rgb: Uint8Array, width: number, height: number, note?: string}>} `rgb`:
 *   height x width x 3; `note`: why these may be other pixels than Pillow's
 */
export async function decode(image) {
  const { note, kind, ...pixels } = await decodePixels(image);
  return { ...pixels, note: note ?? (await decoderNote(kind)) };
}

/** As `decode`, but does not ask whether this browser decodes such files as Pillow does. */
async function decodePixels(image) {
  const bytes = image instanceof Blob ? await readBytes(image) : undefined;
  const header = bytes ? readHeader(bytes) : {};
  if (header.width) checkSize(header.width, header.height); // before memory is taken
  if (header.broken) throw new Error(header.broken);
  const file = bytes && new Blob(header.parts ?? [bytes], { type: image.type });
  const bitmap = await openBitmap(file ?? image, header);
  const { orientation = 1, kind } = header;
  const size = [bitmap.width, bitmap.height];
  const [width, height] = orientation > 4 ? size.reverse() : size;
  try {
    checkSize(width, height);
    const { rgb, transparent, brightest } = readPixels(bitmap, orientation, width, height);
    if (header.opaque && transparent) throw new Error(DAMAGED);
    if (header.dark && brightest < 16) throw new Error(header.dark);
    const note = transparent ? "transparent; browsers don't tell the colours beneath" : header.note;
    return { rgb, width, height, kind, note };
  } finally {
    bitmap.close();
  }
}

const probed = {}; // by kind, a promise of whether this browser decodes the probe as Pillow does

/** Why this browser may decode a kind of file otherwise than Pillow, if so. */
async function decoderNote(kind) {
  if (!kind) return undefined;
  if (!PROBES[kind]) return `${kind}, which this browser may decode otherwise`;
  probed[kind] ??= decodesAsPillow(PROBES[kind]);
  return (await probed[kind]) ? undefined : `${kind}, which this browser decodes otherwise`;
}

async function decodesAsPillow(probe) {
  const bytes = Uint8Array.from(atob(probe.file), (letter) => letter.charCodeAt(0));
  const { rgb } = await decodePixels(new Blob([bytes])).catch(() => ({ rgb: [] }));
  return probe.checksum === rgb.reduce((sum, value) => (Math.imul(31, sum) + value) | 0, 0);
}

async function readBytes(blob) {
  if (blob.size > MAX_BYTES) {
    throw new Error(`a file of ${Math.round(blob.size / 1e6)} MB is too large for a photo`);
  }
  try {
    return new Uint8Array(await blob.arrayBuffer());
  } catch {
    throw new Error("cannot be read; it is a folder, or has changed since it was picked");
  }
}

async function openBitmap(image, { unread }) {
  const options = { colorSpaceConversion: "none", premultiplyAlpha: "none" };
  try {
    return await createImageBitmap(image, image instanceof Blob ? options : {});
  } catch (error) {
    if (!(image instanceof Blob)) throw error;
    if (!image.size) throw new Error("the file is empty");
    if (unread) throw new Error(`this browser cannot read ${unread}; save it as JPEG or PNG`);
    throw new Error(DAMAGED);
  }
}

function checkSize(width, height) {
  if (width * height > MAX_PIXELS) {
    throw new Error(`${width}x${height} are more than 64 megapixels; scale it down`);
  }
  if (Math.max(width, height) > MAX_ASPECT_RATIO * Math.min(width, height)) {
    throw new Error(`${width}x${height} is too elongated; crop it`);
  }
}

/**
 * Draw the bitmap upright, tile by tile, and read its pixels. `transparent`: whether any is;
 * `brightest`: the largest value of red, which in grey images is the brightness.
 */
function readPixels(bitmap, orientation, width, height) {
  const rgb = new Uint8Array(width * height * 3);
  const canvas = new OffscreenCanvas(Math.min(width, TILE), Math.min(height, TILE));
  const context = canvas.getContext("2d", { willReadFrequently: true, colorSpace: "srgb" });
  context.globalCompositeOperation = "copy";
  context.imageSmoothingEnabled = false;
  let [transparent, brightest] = [false, 0];
  for (let top = 0; top < height; top += TILE) {
    for (let left = 0; left < width; left += TILE) {
      const [wide, high] = [Math.min(TILE, width - left), Math.min(TILE, height - top)];
      const [a, b, c, d, x, y] = turn(orientation, width, height);
      context.setTransform(a, b, c, d, x - left, y - top);
      context.drawImage(bitmap, 0, 0);
      const { data } = context.getImageData(0, 0, wide, high);
      for (let row = 0, from = 0; row < high; row += 1) {
        let to = ((top + row) * width + left) * 3;
        for (let column = 0; column < wide; column += 1, from += 4) {
          rgb[to++] = data[from];
          rgb[to++] = data[from + 1];
          rgb[to++] = data[from + 2];
          if (data[from + 3] < 255) transparent = true;
          brightest = Math.max(brightest, data[from]);
        }
      }
    }
  }
  return { rgb, transparent, brightest };
}

/** The canvas transform that turns an image of an EXIF orientation upright, of the upright size. */
function turn(orientation, width, height) {
  return [
    [1, 0, 0, 1, 0, 0],
    [-1, 0, 0, 1, width, 0],
    [-1, 0, 0, -1, width, height],
    [1, 0, 0, -1, 0, height],
    [0, 1, 1, 0, 0, 0],
    [0, 1, -1, 0, width, 0],
    [0, -1, -1, 0, width, height],
    [0, -1, 1, 0, 0, height],
  ][orientation - 1];
}
