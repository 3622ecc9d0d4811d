/**
 * Keeps the page for use without a network: every file is fetched on the first visit, and answered
 * from the browser's cache from then on.
 *
 * FILES is filled in by `capexport web`: each file's address and hash. Another export has other
 * hashes, so that browsers see a changed script here, fetch the changed files, and show them at the
 * next visit. A file with another hash than its own, as while an upload is under way, is not taken.
 */
const FILES = {};
const VERSION = "";

const PREFIX = `capexport ${self.registration.scope} `; // other pages of this origin have their own
const CACHE = PREFIX + VERSION;

self.addEventListener("install", (event) => {
  event.waitUntil(keepFiles().then(() => self.skipWaiting()));
});

async function keepFiles() {
  const cache = await caches.open(CACHE);
  const kept = Object.entries(FILES).map(async ([file, integrity]) => {
    // What the page has just loaded is taken from the browser's own cache, unless it is another.
    const again = () => fetch(file, { integrity, cache: "reload" });
    await cache.put(file, await fetch(file, { integrity }).catch(again));
  });
  await Promise.all(kept);
}

self.addEventListener("activate", (event) => {
  const removed = caches.keys().then((names) => {
    const old = names.filter((name) => name.startsWith(PREFIX) && name !== CACHE);
    return Promise.all(old.map((name) => caches.delete(name)));
  });
  event.waitUntil(removed.then(() => self.clients.claim()));
});

self.addEventListener("fetch", (event) => {
  const url = new URL(event.request.url);
  if (event.request.method !== "GET" || url.origin !== location.origin) return;
  url.search = "";
  url.pathname = url.pathname.replace(/\/index\.html$/, "/");
  event.respondWith(
    caches
      .open(CACHE)
      .then((cache) => cache.match(url.href, { ignoreVary: true }))
      .then((kept) => kept ?? fetch(event.request)),
  );
});
