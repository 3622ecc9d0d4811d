/**
 * The worker behind captioner.js. Its first message is {model}, the address of captioner.onnx, and
 * each further one {image}. It answers each with {}, a caption, or {error, broken}, where `broken`
 * says that another worker is needed.
 */
import * as ort from "./onnxruntime.js";
import { decode } from "./pixels.js";

// One thread. More need a page that is cross-origin isolated, by two headers (COOP and COEP) that
// static hosts seldom send, and would take the cores that a phone draws the page with.
ort.env.wasm.numThreads = 1;
ort.env.wasm.wasmPaths = { wasm: new URL("onnxruntime.wasm", import.meta.url).href };

let session;

self.onmessage = async ({ data }) => {
  let broken = !session;
  try {
    if (!session) {
      session = await blaming(data.model, openModel(data.model));
      self.postMessage({});
      return;
    }
    const began = performance.now();
    const pixels = await blaming(data.image.name ?? "image", decode(data.image));
    const { rgb, width, height, note } = pixels;
    broken = true; // if the next line fails: WebAssembly may be out of memory, and stays so
    const said = await session.run({ image: new ort.Tensor("uint8", rgb, [height, width, 3]) });
    self.postMessage({
      text: said.words.data.join(" "),
      tokens: Array.from(said.tokens.data, Number),
      logProbability: said.log_probability.data[0],
      milliseconds: performance.now() - began,
      width,
      height,
      note,
    });
  } catch (error) {
    self.postMessage({ error: error.message ?? String(error), broken });
  }
};

async function openModel(url) {
  const response = await fetch(url);
  if (!response.ok) throw new Error(`cannot be loaded (${response.status})`);
  return ort.InferenceSession.create(new Uint8Array(await response.arrayBuffer()));
}

/** What `promise` gives; the file's name is put in front of its error. */
async function blaming(name, promise) {
  try {
    return await promise;
  } catch (error) {
    throw new Error(`${name}: ${error.message}`);
  }
}
