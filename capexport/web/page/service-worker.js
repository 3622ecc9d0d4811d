/**
 * Keeps the page for use without a network: every file is fetched on the first visit, and answered
 * from a cache from then on.
 *
 * `capexport web` fills in FILES, each file's address and hash, and VERSION, a hash of them all.
 * After another export this script has changed, so browsers install it beside the old one, which
 * fetches all files, and show these at the next visit. While an upload is under way, some files
 * don't have their hash yet: the installation fails, and the next visit tries again.
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
    // First from the browser's HTTP cache, since the page has just loaded these files.
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
