/** The page: takes photos in, captions them one after the other, and shows what came of each. */
import { Captioner } from "./captioner.js";

const names = ["files", "status", "doing", "progress", "stop", "results", "title", "result"];
const [files, status, doing, progress, stop, results, title, template] = names.map((id) =>
  document.getElementById(id),
);

document.getElementById("idle").remove();

const waiting = [];
let [taken, captioned, failed, running, captioner] = [0, 0, 0, false, undefined];

files.addEventListener("change", () => {
  add(files.files);
  files.value = ""; // so that the same file can be picked again
});
stop.addEventListener("click", () => {
  waiting.length = 0;
  files.focus(); // this button is about to vanish
});
document.addEventListener("paste", (event) => {
  if (event.clipboardData.files.length) add(event.clipboardData.files);
});
document.addEventListener("dragover", (event) => {
  event.preventDefault(); // the browser would open the photo in the page's place
  document.body.classList.add("dropping");
});
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) document.body.classList.remove("dropping");
});
document.addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("dropping");
  if (event.dataTransfer.files.length) add(event.dataTransfer.files);
  else status.textContent = "What was dropped is no file.";
});

try {
  captioner = await Captioner.load();
  status.textContent = "Ready";
  run();
  await keepForLater();
} catch (error) {
  status.textContent = `The captioner cannot be loaded: ${error.message}`;
  doing.textContent = "";
  files.disabled = true;
  progress.hidden = true;
}

/** Have the service worker keep the page for when there is no network. */
async function keepForLater() {
  if (!navigator.serviceWorker) return; // pages over plain http have none, except on localhost
  try {
    await navigator.serviceWorker.register("service-worker.js");
    await navigator.serviceWorker.ready;
    if (status.textContent === "Ready") status.textContent = "Ready, also without a network";
  } catch (error) {
    console.warn(`not kept for use without a network: ${error.message}`);
  }
}

function add(photos) {
  if (files.disabled) return; // the captioner could not be loaded
  waiting.push(...photos);
  if (captioner) run();
  else doing.textContent = `${waiting.length} waiting`;
}

async function run() {
  if (running) return;
  [running, taken, captioned, failed] = [true, 0, 0, 0];
  while (waiting.length) {
    const photo = waiting.shift();
    taken += 1;
    showProgress(photo);
    try {
      show(photo, await captioner.caption(photo));
      captioned += 1;
    } catch (error) {
      showError(error);
      failed += 1;
    }
  }
  running = false;
  showEnd();
}

function showProgress(photo) {
  const all = taken + waiting.length;
  doing.textContent = `${taken} of ${all}: ${photo.name}`;
  status.textContent = "";
  progress.hidden = false;
  progress.max = all;
  progress.value = taken - 1;
  progress.setAttribute("aria-label", "Photos captioned");
  stop.hidden = !waiting.length;
}

function showEnd() {
  doing.textContent = "";
  progress.hidden = stop.hidden = true;
  if (!taken) return;
  const what = `${captioned} ${captioned === 1 ? "photo" : "photos"} captioned`;
  status.textContent = failed ? `${what}, ${failed} could not be` : what;
}

function show(photo, { text, width, height, milliseconds, note }) {
  const item = newItem(text);
  const facts = [photo.name, `${width} × ${height}`, `${Math.round(milliseconds)} ms`];
  if (note) facts.push(`perhaps not as in Python: ${note}`);
  item.querySelector(".details").textContent = facts.join(", ");
  showThumbnail(photo, item.querySelector("canvas"));
  const copy = item.querySelector(".copy");
  label(copy, "Copy", text);
  copy.hidden = !navigator.clipboard; // pages over plain http have none
  copy.addEventListener("click", () => copyText(text, copy));
}

function showError(error) {
  const item = newItem(error.message);
  item.classList.add("error");
  item.querySelector("canvas").remove();
  item.querySelector(".details").remove();
  item.querySelector(".copy").remove();
}

/** A new first item of the list. */
function newItem(text) {
  const item = template.content.cloneNode(true).firstElementChild;
  item.querySelector(".caption").textContent = text;
  title.hidden = false;
  results.prepend(item);
  return item;
}

/** On a canvas, since the page's policy forbids the blob: address that an <img> would need. */
async function showThumbnail(photo, canvas) {
  const image = await createImageBitmap(photo, { resizeWidth: canvas.width, resizeQuality: "high" });
  const scale = Math.max(canvas.width / image.width, canvas.height / image.height);
  const [wide, high] = [image.width * scale, image.height * scale];
  const [left, top] = [(canvas.width - wide) / 2, (canvas.height - high) / 2];
  canvas.getContext("2d").drawImage(image, left, top, wide, high);
  image.close();
}

async function copyText(text, button) {
  let outcome = "Copied";
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    outcome = "Not allowed";
  }
  label(button, outcome, text);
  status.textContent = outcome;
  setTimeout(() => label(button, "Copy", text), 2000);
}

/** Give a button its word, and screen readers also the caption beside which it stands. */
function label(button, word, text) {
  button.textContent = word;
  button.setAttribute("aria-label", `${word}: ${text}`);
}
