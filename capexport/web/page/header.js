const BREAKS_OFF = "the file breaks off before its end";
export const DAMAGED = "damaged, or no image that this browser can read";

/**
 * Read the header of an image file, and make its bytes such that every browser decodes the pixels
 * that Pillow does: colour profiles, gamma, orientation and animation, which browsers each apply in
 * their own way, are taken out.
 *
 * @typedef {object} Header - every field is optional
 * @property {number} width - pixels, before it is turned
 * @property {number} height
 * @property {number} orientation - of EXIF or XMP, 1 to 8, which the browser no longer applies
 * @property {Uint8Array[]} parts - what to decode in place of the whole file
 * @property {string} broken - why to refuse the file, though some browsers would decode it
 * @property {boolean} opaque - it has no transparency: pixels that come out so were not decoded
 * @property {string} dark - why to refuse the image if it is nearly black
 * @property {string} note - why its pixels may differ from Pillow's in any browser
 * @property {string} kind - a key of PROBES, or a format that has no probe
 * @property {string} unread - the format's name, if few browsers read it
 *
 * @param {Uint8Array} bytes - of the whole file; changed in place
 * @returns {Header}
 */
export function readHeader(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const start = text(bytes, 0, 4);
  try {
    if (start === "\x89PNG") return png(bytes, view);
    if (start.startsWith("\xff\xd8")) return jpeg(bytes, view);
    if (start === "RIFF" && text(bytes, 8, 4) === "WEBP") return webp(bytes, view);
    if (start === "GIF8") return gif(bytes, view);
    if (start.startsWith("BM")) return bmp(view);
    if (start === "II*\0" || start === "MM\0*") return { kind: "TIFF", unread: "TIFF" };
    if (text(bytes, 4, 4) === "ftyp") return isoMedia(bytes, view);
  } catch (error) {
    if (!(error instanceof RangeError)) throw error; // thrown by `view` beyond the end
    return { broken: BREAKS_OFF };
  }
  return {};
}

function text(bytes, at, length) {
  return String.fromCharCode(...bytes.subarray(at, at + length));
}

const PNG_END = [0, 0, 0, 0, 0x49, 0x45, 0x4e, 0x44, 0xae, 0x42, 0x60, 0x82];

/** Only the critical chunks and tRNS (transparency) are decoded. */
function png(bytes, view) {
  const header = { width: view.getUint32(16), height: view.getUint32(20) };
  const [exif, xmp] = [[], []];
  if (bytes[24] === 16) header.kind = "PNG of 16 bits";
  if (bytes[24] === 16 && bytes[25] === 0) {
    header.dark = "grey of 16 bits whose brightness is uncertain; save it with 8 bits";
  }
  header.opaque = bytes[25] < 4; // colour types without alpha, unless there is a tRNS
  header.parts = [bytes.subarray(0, 8)];
  for (let at = 8, kind = ""; at + 8 <= bytes.length && kind !== "IEND"; ) {
    const end = at + 12 + view.getUint32(at);
    kind = text(bytes, at + 4, 4);
    if (kind === "eXIf") exif.push(bytes.subarray(at + 8, end));
    if (kind === "iTXt" && text(bytes, at + 8, 13) === "XML:com.adobe") {
      xmp.push(bytes.subarray(at + 8, end));
    }
    if (kind === "tRNS") header.opaque = false;
    if (/^[A-Z]|tRNS/.test(kind) && kind !== "IEND") {
      header.parts.push(bytes.subarray(at, end));
      if (end > bytes.length) header.broken ??= BREAKS_OFF;
      else if (crc(bytes, at + 4, end - 4) !== view.getUint32(end - 4)) header.broken ??= DAMAGED;
    }
    at = end;
  }
  header.orientation = orientation(exif, xmp);
  header.parts.push(Uint8Array.from(PNG_END)); // WebKit decodes none without; Pillow does
  return header;
}

const CRC = Uint32Array.from({ length: 256 }, (_, number) => {
  for (let bit = 0; bit < 8; bit += 1) number = (number >>> 1) ^ (number & 1 && 0xedb88320);
  return number;
});

function crc(bytes, start, end) {
  let sum = -1;
  for (let at = start; at < end; at += 1) sum = CRC[(sum ^ bytes[at]) & 255] ^ (sum >>> 8);
  return ~sum >>> 0;
}

function jpeg(bytes, view) {
  const header = { kind: "JPEG", opaque: true };
  const [exif, xmp] = [[], []];
  let at = 2;
  for (let marker = 0; marker !== 0xda; ) {
    while (view.getUint8(at) !== 255 || [0, 0xd8, 255].includes(view.getUint8(at + 1))) at += 1;
    marker = bytes[at + 1];
    const end = at + 2 + view.getUint16(at + 2);
    // Frame headers, SOF0 to SOF15; C4, C8 and CC are other segments.
    if (marker >= 0xc0 && marker <= 0xcf && ![0xc4, 0xc8, 0xcc].includes(marker)) {
      header.height = view.getUint16(at + 5);
      header.width = view.getUint16(at + 7);
    }
    // JFIF (E0) and Adobe (EE) say how colours are coded. Other metadata become comments (FE).
    if (marker > 0xe0 && marker <= 0xef && marker !== 0xee) {
      const body = bytes.subarray(at + 4, end);
      if (text(body, 0, 6) === "Exif\0\0") exif.push(body);
      if (text(body, 0, 28) === "http://ns.adobe.com/xap/1.0/") xmp.push(body);
      bytes[at + 1] = 0xfe;
    }
    at = end;
  }
  header.orientation = orientation(exif, xmp);
  let last = bytes.length - 2; // of the last FF D9, which marks the end; coded pixels have none
  while (last > at && (bytes[last] !== 0xff || bytes[last + 1] !== 0xd9)) last -= 1;
  if (last <= at) header.broken = BREAKS_OFF;
  return header;
}

function webp(bytes, view) {
  const header = { kind: "WebP" };
  if (view.getUint32(4, true) + 8 > bytes.length) header.broken = BREAKS_OFF;
  if (text(bytes, 12, 4) !== "VP8X") return header;
  const uint24 = (at) => view.getUint16(at, true) | (view.getUint8(at + 2) << 16);
  Object.assign(header, { width: uint24(24) + 1, height: uint24(27) + 1 });
  const chunks = { EXIF: [], ICCP: [], "XMP ": [] };
  bytes[20] &= ~0x2c; // the flags for a profile, EXIF and XMP
  for (let at = 12; at + 8 < bytes.length; ) {
    const [kind, length] = [text(bytes, at, 4), view.getUint32(at + 4, true)];
    chunks[kind]?.push(bytes.subarray(at + 8, at + 8 + length));
    if (kind in chunks) bytes.fill(0x2d, at, at + 4); // named "----", it is skipped as unknown
    at += 8 + length + (length % 2);
  }
  header.orientation = orientation(chunks.EXIF, chunks["XMP "]);
  return header;
}

/** Reads up to the end of the first frame. */
function gif(bytes, view) {
  const table = (at) => (view.getUint8(at) & 128 ? 6 << (bytes[at] & 7) : 0); // bytes of colours
  const header = { width: view.getUint16(6, true), height: view.getUint16(8, true) };
  for (let at = 13 + table(10), kind = 0x21; kind === 0x21; ) {
    kind = view.getUint8(at);
    if (kind !== 0x21 && kind !== 0x2c) break;
    if (kind === 0x2c) {
      const [left, top, wide, high] = [1, 3, 5, 7].map((from) => view.getUint16(at + from, true));
      const whole = !left && !top && wide === header.width && high === header.height;
      if (!whole) header.note = "a first frame of another size, which browsers place otherwise";
    }
    at += kind === 0x2c ? 11 + table(at + 9) : 2;
    while (view.getUint8(at)) at += 1 + bytes[at];
    at += 1;
  }
  return header;
}

function bmp(view) {
  if (view.getUint32(14, true) < 40) return {};
  const [width, height] = [18, 22].map((at) => Math.abs(view.getInt32(at, true)));
  const bits = view.getUint16(28, true);
  const rows = [0, 3, 6].includes(view.getUint32(30, true)) ? height : 0; // else compressed
  const end = view.getUint32(10, true) + Math.ceil((width * bits) / 32) * 4 * rows;
  const note = bits === 16 ? "BMP of 16 bits, which browsers scale otherwise" : undefined;
  return { width, height, note, broken: end > view.byteLength ? BREAKS_OFF : undefined };
}

/** AVIF and HEIC. */
function isoMedia(bytes, view) {
  const brands = text(bytes, 8, Math.min(view.getUint32(0), 64) - 8);
  if (/hei[cxms]|hev[cxms]/.test(brands)) return { kind: "HEIC", unread: "HEIC" };
  const note = "animated AVIF, whose first frame decoders disagree on";
  return { kind: "AVIF", note: brands.includes("avis") ? note : undefined };
}

/** Like Pillow, from the first EXIF block that has one, or else from XMP; 1 if there is none. */
function orientation(exif, xmp) {
  const found = [...exif.map(exifOrientation), ...xmp.map(xmpOrientation)];
  const value = found.find((value) => value !== undefined);
  return value >= 1 && value <= 8 ? value : 1;
}

function xmpOrientation(bytes) {
  const [, value] = /tiff:Orientation(?:="|>)(\d)/.exec(new TextDecoder().decode(bytes)) ?? [];
  return value && Number(value);
}

/** However broken they are, EXIF data are never a reason to refuse a photo. */
function exifOrientation(exif) {
  while (text(exif, 0, 6) === "Exif\0\0") exif = exif.subarray(6); // some files have it twice
  const view = new DataView(exif.buffer, exif.byteOffset, exif.byteLength);
  const little = text(exif, 0, 2) === "II";
  try {
    const first = view.getUint32(4, little);
    for (let index = 0; index < view.getUint16(first, little); index += 1) {
      const entry = first + 2 + 12 * index;
      if (view.getUint16(entry, little) !== 0x0112) continue;
      const [type, count] = [view.getUint16(entry + 2, little), view.getUint32(entry + 4, little)];
      if ([3, 8].includes(type)) return view.getUint16(entry + 8, little);
      return [4, 9, 13].includes(type) && count === 1 ? view.getUint32(entry + 8, little) : 1;
    }
  } catch (error) {
    if (!(error instanceof RangeError)) throw error;
  }
  return undefined;
}
