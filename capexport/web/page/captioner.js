const CLASSES = ["Blob", "File", "ImageData", "ImageBitmap"];

/**
 * Captions for photos, made on this device.
 *
 *     import { Captioner } from "./captioner.js";
 *     const captioner = await Captioner.load();
 *     const { text } = await captioner.caption(file);
 *
 * A worker does the work, so that the page stays responsive. It needs captioner-worker.js,
 * pixels.js, header.js, probes.js, onnxruntime.js, onnxruntime.wasm and captioner.onnx beside this
 * file, and all of them, like the script of any worker, on the page's own origin.
 */
export class Captioner {
  #model;
  #worker;
  #turn = Promise.resolve();
  #giveUp = () => {};

  /**
   * @param {string | URL} model - where captioner.onnx is; beside this file unless given
   * @returns {Promise<Captioner>} rejected where a file cannot be loaded
   */
  static async load(model = new URL("captioner.onnx", import.meta.url)) {
    const captioner = new Captioner();
    captioner.#model = new URL(model, location.href).href;
    await captioner.#start();
    return captioner;
  }

  /**
   * The caption of one photo; several that are asked for at once are captioned in turn.
   *
   * @param {Blob | ImageData | ImageBitmap} image - an image file, as a `File` is, or its pixels
   * @returns {Promise<{text: string, tokens: number[], logProbability: number,
   *   milliseconds: number, width: number, height: number, note?: string}>}
   *   `logProbability`: natural logarithm of the caption's probability; `milliseconds`: decoding
   *   and captioning; `note`: why capexport in Python may see other pixels in this file.
   *   Rejected with an `Error` that names the file where the image cannot be captioned.
   */
  caption(image) {
    const caption = this.#turn.then(async () => {
      // Not instanceof: a photo from a frame is of that frame's own class.
      const name = Object.prototype.toString.call(image).slice(8, -1);
      if (!CLASSES.includes(name)) {
        const taken = CLASSES.join(", ");
        throw new TypeError(`image: no ${taken}, but ${name}; createImageBitmap() takes elements`);
      }
      if (!this.#worker) await this.#start();
      return this.#ask({ image });
    });
    this.#turn = caption.catch(() => {});
    return caption;
  }

  /** End the worker, which frees its memory. What is waiting is rejected. */
  close() {
    this.#model = undefined;
    this.#stop(new Error("the captioner is closed"));
  }

  async #start() {
    if (!this.#model) throw new Error("the captioner is closed");
    const url = new URL("captioner-worker.js", import.meta.url);
    this.#worker = new Worker(url, { type: "module", name: "captioner" });
    await this.#ask({ model: this.#model });
  }

  #stop(reason) {
    this.#worker?.terminate();
    this.#worker = undefined; // the next photo starts another
    this.#giveUp(reason);
  }

  /** Post one message to the worker, and wait for its one answer. */
  #ask(message) {
    return new Promise((resolve, reject) => {
      this.#giveUp = reject;
      this.#worker.onerror = ({ message }) =>
        this.#stop(new Error(message || "captioner-worker.js, or a file it needs, cannot be loaded"));
      this.#worker.onmessage = ({ data: { error, broken, ...answer } }) => {
        if (broken) this.#stop(new Error(error));
        else if (error) reject(new Error(error));
        else resolve(answer);
      };
      this.#worker.postMessage(message);
    });
  }
}
