/** The worker behind captioner.js: first it is sent the model's address, then images. */
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
      session = await named(opened(data.model), data.model);
      self.postMessage({});
      return;
    }
    const began = performance.now();
    const { rgb, width, height, note } = await named(decode(data.image), data.image.name ?? "image");
    broken = true; // should the next line fail: memory that ran out in WebAssembly stays so
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

async function opened(url) {
  const response = await fetch(url);
  if (!response.ok) throw new Error(`cannot be loaded (${response.status})`);
  return ort.InferenceSession.create(new Uint8Array(await response.arrayBuffer()));
}

/** What `promise` gives; its error begins with the file's name. */
async function named(promise, name) {
  try {
    return await promise;
  } catch (error) {
    throw new Error(`${name}: ${error.message}`);
  }
}
