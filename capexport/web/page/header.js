/**
 * What the bytes of an image file tell before it is decoded. All of it is optional.
 *
 * @param {Uint8Array} bytes
 * @returns {{width?: number, height?: number, orientation?: number, dark?: string, note?: string,
 *   unread?: string, other?: string}} `orientation`: EXIF's, 1 to 8, where browsers leave it to
 *   us; `dark`: why a nearly black image of this kind is refused; `note`: why other pixels than
 *   Pillow's may come of it; `other`: what kind it is, where they come of it outside Chromium;
 *   `unread`: the format's name where few browsers read it
 */
export function readHeader(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  try {
    const start = text(view, 0, 4);
    if (start === "\x89PNG") return png(view);
    if (start.startsWith("\xff\xd8")) return jpeg(view);
    if (start === "RIFF" && text(view, 8, 4) === "WEBP") return webp(view);
    if (start === "II*\0" || start === "MM\0*") return { unread: "TIFF" };
    if (text(view, 4, 4) === "ftyp") return isoMedia(view);
  } catch (error) {
    if (!(error instanceof RangeError)) throw error; // the file ends early: the decoder will say so
  }
  return {};
}

function text(view, at, length) {
  return String.fromCharCode(...new Uint8Array(view.buffer, view.byteOffset + at, length));
}

function png(view) {
  const header = { width: view.getUint32(16), height: view.getUint32(20) };
  if (view.getUint8(24) === 16) header.other = "PNG of 16 bits";
  if (header.other && view.getUint8(25) === 0) {
    header.dark = "grey of 16 bits whose brightness is uncertain; save it with 8 bits";
  }
  for (let at = 8, animated = false, frames = 0; ; at += 12 + view.getUint32(at)) {
    const kind = text(view, at + 4, 4);
    if (kind === "acTL") animated = true;
    if (kind === "fcTL") frames += 1;
    if (kind !== "IDAT" && kind !== "IEND") continue;
    if (animated && !frames) header.note = "animated, with a still image that browsers don't show";
    return header;
  }
}

function jpeg(view) {
  for (let at = 2; ; at += 2 + view.getUint16(at + 2)) {
    while (view.getUint8(at) === 255 && view.getUint8(at + 1) === 255) at += 1;
    const marker = view.getUint8(at + 1);
    if (view.getUint8(at) !== 255 || marker === 0xda) return {};
    // All frame headers, C0 to CF, but not the tables that have numbers among them.
    if (marker >= 0xc0 && marker <= 0xcf && ![0xc4, 0xc8, 0xcc].includes(marker)) {
      return { height: view.getUint16(at + 5), width: view.getUint16(at + 7) };
    }
  }
}

/** Chromium turns no WebP, so it is done here. */
function webp(view) {
  if (text(view, 12, 4) !== "VP8X") return {};
  const uint24 = (at) => view.getUint16(at, true) | (view.getUint8(at + 2) << 16);
  const header = { width: uint24(24) + 1, height: uint24(27) + 1, orientation: 1 };
  for (let at = 12; at + 8 < view.byteLength; ) {
    const length = view.getUint32(at + 4, true);
    if (text(view, at, 4) === "EXIF") {
      header.orientation = exifOrientation(view, at + 8);
      break;
    }
    at += 8 + length + (length % 2);
  }
  return header;
}

function exifOrientation(view, start) {
  const at = text(view, start, 4) === "Exif" ? start + 6 : start;
  const little = text(view, at, 2) === "II";
  const first = at + view.getUint32(at + 4, little);
  for (let index = 0; index < view.getUint16(first, little); index += 1) {
    const entry = first + 2 + 12 * index;
    if (view.getUint16(entry, little) !== 0x0112) continue;
    const value = view.getUint16(entry + 8, little);
    return value >= 1 && value <= 8 ? value : 1;
  }
  return 1;
}

/** AVIF and HEIC. */
function isoMedia(view) {
  const brands = text(view, 8, Math.min(view.getUint32(0), 64) - 8);
  if (brands.includes("avis")) return { note: "animated AVIF, whose first frame decoders disagree on" };
  return /hei[cxms]|hev[cxms]/.test(brands) ? { unread: "HEIC" } : { other: "AVIF" };
}
