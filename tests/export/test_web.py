"""The web page in real browsers: Chromium, and the engine of Safari."""

import base64
import contextlib
import hashlib
import http.server
import json
import os
import re
import shutil
import struct
import subprocess
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from conftest import COMMITTED, draw_photo
from PIL import Image

from capexport.captioner import BUNDLED_ARTIFACT
from capexport.cli import main
from capexport.errors import DownloadError, MissingExtraError
from capexport.preprocessing import load_image
from capexport.web import PAGE, fetch_runtime, write_site

ORIGINALS = Path(__file__).parents[3] / "shared" / "data" / "originals"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
DRIVER = shutil.which("chromedriver")
WEBKIT = next(Path("/usr/lib").glob("*/webkit2gtk-4.*/MiniBrowser"), None)
POLICY = "default-src 'self'; script-src 'self' 'wasm-unsafe-eval'; report-uri /violation"
AXE = "axe-core@4.14.1"

pytest.importorskip("selenium", reason="needs selenium, of the extra `dev`")
from selenium import webdriver  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.wait import WebDriverWait  # noqa: E402

in_a_browser = pytest.mark.skipif(
    not (BROWSER and DRIVER), reason="needs Debian's packages chromium and chromium-driver"
)


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        return fetch_runtime(tmp_path_factory.mktemp("runtime"))
    except (MissingExtraError, DownloadError) as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def site(runtime: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of the bundled captioner."""
    out = tmp_path_factory.mktemp("bundled") / "site"
    written = write_site(BUNDLED_ARTIFACT, out, runtime=runtime)
    assert written.parity.manifest.precision == "w8"
    assert sum(written.sizes.values()) < 25e6
    return out


@pytest.fixture(scope="module")
def small_site(runtime: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("small") / "site"
    write_site(COMMITTED / "cnn-lstm", out, runtime=runtime)
    return out


class Server(http.server.ThreadingHTTPServer):
    """A static host behind a strict policy.

    Attributes:
        folder: what it serves.
        violations: what the browser reported against the policy, in the page and its workers.
    """

    def __init__(self, folder: Path, policy: str = POLICY, port: int = 0) -> None:
        self.folder, self.policy, self.violations = folder, policy, []
        super().__init__(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self.shutdown()
        self.server_close()


class Handler(http.server.SimpleHTTPRequestHandler):
    server: Server

    def translate_path(self, path: str) -> str:
        self.directory = str(self.server.folder)
        return super().translate_path(path)

    def end_headers(self) -> None:
        self.send_header("Content-Security-Policy", self.server.policy)
        super().end_headers()

    def send_head(self) -> object:
        # http.server would take a folder that replaces a newer one for unchanged.
        del self.headers["If-Modified-Since"]
        return super().send_head()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.violations.append(json.loads(body)["csp-report"])
        self.send_response(204)
        self.end_headers()

    def log_message(self, *args: object) -> None:
        pass


@contextlib.contextmanager
def served(folder: Path, **options) -> Iterator[Server]:
    server = Server(folder, **options)
    try:
        yield server
    finally:
        server.stop()


@contextlib.contextmanager
def browsing(*flags: str) -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", *flags):
        options.add_argument(flag)
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    try:
        driver.set_script_timeout(120)
        yield driver
    finally:
        driver.quit()


@pytest.fixture
def webkit() -> Iterator[webdriver.WebKitGTK]:
    """Another browser, on a screen of its own."""
    if not (WEBKIT and shutil.which("WebKitWebDriver") and shutil.which("Xvfb")):
        pytest.skip("needs Debian's packages webkit2gtk-driver and xvfb")
    options = webdriver.WebKitGTKOptions()
    options.binary_location = str(WEBKIT)
    options.add_argument("--automation")
    with subprocess.Popen(["Xvfb", "-displayfd", "1"], stdout=subprocess.PIPE, text=True) as screen:
        assert screen.stdout is not None
        environment = {**os.environ, "DISPLAY": f":{screen.stdout.readline().strip()}"}
        try:
            service = webdriver.WebKitGTKService("/usr/bin/WebKitWebDriver", env=environment)
            driver = webdriver.WebKitGTK(options, service)
            driver.set_script_timeout(120)
            yield driver
            driver.quit()
        finally:
            screen.terminate()


@pytest.fixture(scope="module")
def page(site: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple]:
    """(driver, server): the page of the bundled captioner, open and ready.

    At the end, of all that pages, workers and service workers asked for, nothing was elsewhere.
    """
    log = tmp_path_factory.mktemp("requests") / "log.json"
    with served(site) as server:
        with browsing(f"--log-net-log={log}") as driver:
            visit(driver, server)
            wait(driver, lambda: "without a network" in status(driver))
            yield driver, server
        assert server.violations == []
    events = [event.get("params", {}) for event in json.loads(log.read_text())["events"]]
    ours = [event for event in events if "http://127.0.0.1:" in event.get("initiator", "")]
    asked = {event["url"] for event in ours if "url" in event}
    assert {server.url + name for name in ("captioner.onnx", "onnxruntime.wasm")} <= asked
    assert {url for url in asked if not url.startswith("http://127.0.0.1:")} == set()


@contextlib.contextmanager
def new_tab(driver: webdriver.Chrome) -> Iterator[None]:
    before = driver.current_window_handle
    driver.switch_to.new_window("tab")
    try:
        yield
    finally:
        driver.close()
        driver.switch_to.window(before)


def visit(driver: webdriver.Chrome, server: Server) -> None:
    driver.get(server.url)
    wait(driver, lambda: "Ready" in status(driver))


def wait(driver: webdriver.Chrome, condition, seconds: float = 60) -> None:
    WebDriverWait(driver, seconds, 0.1).until(lambda _: condition())


def status(driver: webdriver.Chrome) -> str:
    return driver.find_element(By.ID, "status").text


def pick(driver: webdriver.Chrome, paths: list[Path]) -> list[tuple[str, str]]:
    """Choose files, wait, and read (text, details) of what came of them, newest first."""
    before = len(items(driver))
    driver.find_element(By.ID, "files").send_keys("\n".join(map(str, paths)))
    wait(driver, lambda: len(items(driver)) == before + len(paths))
    wait(driver, lambda: "captioned" in status(driver))
    return items(driver)[: len(paths)]


def items(driver: webdriver.Chrome) -> list[tuple[str, str]]:
    return driver.execute_script(
        "return [...document.querySelectorAll('li')].map((item) => "
        "[item.querySelector('.caption').textContent, "
        "item.querySelector('.details')?.textContent ?? ''])"
    )


def python_captions(site: Path, paths: list[Path]) -> list[str]:
    session = onnxruntime.InferenceSession(site / "captioner.onnx")
    runs = (session.run(["words"], {"image": np.asarray(load_image(path))}) for path in paths)
    return [" ".join(words) for [words] in runs]


def photos_of_all_kinds(folder: Path) -> list[Path]:
    """Files that Pillow and browsers read in many ways."""
    folder.mkdir()
    noise = np.random.default_rng(1).integers(-20, 20, (300, 400, 3))
    pixels = (np.asarray(draw_photo(7, (400, 300))).astype(int) + noise).clip(0, 255)
    photo = Image.fromarray(pixels.astype(np.uint8))
    grey16 = Image.fromarray(np.asarray(photo.convert("L")).astype(np.uint16) * 257)
    profile = other_profile()
    exif = {turn: Image.Exif() for turn in (3, 5, 6, 8)}
    for turn, tags in exif.items():
        tags[0x0112] = turn
    xmp = b'<rdf:Description tiff:Orientation="6"/>'
    frames = [draw_photo(seed) for seed in (8, 9)]
    for name, (image, options) in {
        "plain.jpg": (photo, {}),
        "profile.jpg": (photo, {"icc_profile": profile, "subsampling": 0}),
        "progressive.jpg": (photo, {"progressive": True}),
        "grey.jpg": (photo.convert("L"), {}),
        "cmyk.jpg": (photo.convert("CMYK"), {}),
        "upside-down.jpg": (photo, {"exif": exif[3]}),
        "turned.jpg": (photo, {"exif": exif[6]}),
        "turned-by-xmp.jpg": (photo, {"xmp": xmp}),
        "turned-by-xmp.webp": (photo, {"xmp": xmp, "lossless": True}),
        "turned.webp": (photo, {"exif": exif[5], "lossless": True}),
        "turned.png": (photo, {"exif": exif[8], "icc_profile": profile}),
        "opaque.png": (photo.convert("RGBA"), {}),
        "palette.png": (photo.quantize(), {}),
        "grey16.png": (grey16, {}),
        "lossy.webp": (photo, {}),
        "animated.gif": (frames[0], {"save_all": True, "append_images": frames[1:]}),
        "bitmap.bmp": (photo, {}),
        "wide.jpg": (draw_photo(10, (3000, 60)), {}),
    }.items():
        image.save(folder / name, **options)
    return sorted(folder.iterdir())


def other_profile() -> bytes:
    """A colour profile that takes red for green."""
    from PIL import ImageCms

    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    swap = {b"rXYZ": b"gXYZ", b"gXYZ": b"rXYZ"}
    tags = profile[128:].split(b"rXYZ", 1)
    assert b"gXYZ" in tags[1]
    return profile[:128] + tags[0] + swap[b"rXYZ"] + tags[1].replace(b"gXYZ", swap[b"gXYZ"], 1)


@in_a_browser
def test_captions_are_pythons(page, tmp_path: Path):
    driver, server = page
    photos = photos_of_all_kinds(tmp_path / "photos")
    photos += sorted(ORIGINALS.glob("*.jpg"))[:4]
    shown = pick(driver, photos)[::-1]  # the newest comes first
    assert driver.get_log("browser") == []
    assert [text for text, _ in shown] == python_captions(server.folder, photos)
    assert len({text for text, _ in shown}) > 4
    for photo, (_, details) in zip(photos, shown, strict=True):
        assert photo.name in details and " ms" in details and "Python" not in details


HASHES = """
const [paths, done] = [document.getElementById("probe").files, arguments[0]];
const hex = (hash) => [...new Uint8Array(hash)].map((n) => n.toString(16).padStart(2, 0)).join("");
import("./pixels.js").then(async ({ decode }) => {
  const said = [];
  for (const path of paths) {
    try {
      const { rgb, width, height, note } = await decode(path);
      said.push([width, height, hex(await crypto.subtle.digest("SHA-256", rgb)), note ?? null]);
    } catch (error) {
      said.push(error.message);
    }
  }
  return said;
}).then(done, (error) => done(String(error)));
"""


def decoded(driver: webdriver.Chrome, paths: list[Path]) -> list:
    """(width, height, hash of the pixels, note) of each file, by the page's own pixels.js; of one
    that it refuses, the reason."""
    driver.execute_script(
        "const probe = document.createElement('input'); document.body.append(probe);"
        "Object.assign(probe, {type: 'file', id: 'probe', multiple: true});"
    )
    driver.find_element(By.ID, "probe").send_keys("\n".join(map(str, paths)))
    said = driver.execute_async_script(HASHES)
    driver.execute_script("document.getElementById('probe').remove()")
    return said


@in_a_browser
def test_pixels_are_pillows_or_a_note_says_why_not(page, tmp_path: Path):
    driver, _ = page
    photos = [*photos_of_all_kinds(tmp_path / "photos"), *sorted(ORIGINALS.glob("*.jpg"))[4:24]]
    for turn in range(1, 9):
        for name in (f"{turn}.jpg", f"{turn}.webp"):
            tags = Image.Exif()
            tags[0x0112] = turn
            draw_photo(turn, (41, 31)).save(tmp_path / name, exif=tags)
            photos.append(tmp_path / name)
    for kind, value in ((3, 6 << 16), (4, 6)):  # as a short and as a long, behind one prefix or two
        tag = b"Exif\0\0MM\0*" + struct.pack(">IHHHIII", 8, 1, 0x0112, kind, 1, value, 0)
        for prefix in (b"", b"Exif\0\0"):
            photos.append(tmp_path / f"{kind} {len(prefix)}.jpg")
            draw_photo(6, (41, 31)).save(photos[-1], exif=prefix + tag)
    draw_photo(3, (2100, 2060)).save(large := tmp_path / "tiles.png", compress_level=1)
    frames = [draw_photo(seed) for seed in (2, 3)]
    draw_photo(1).save(
        still := tmp_path / "still.png", save_all=True, default_image=True, append_images=frames
    )
    photos += [large, still]
    for path, said in zip(photos, decoded(driver, photos), strict=True):
        assert said == [*pillows(path), None], path.name


def pillows(path: Path) -> tuple[int, int, str]:
    """(width, height, hash of the pixels) as `load_image` has them."""
    image = load_image(path)
    return *image.size, hashlib.sha256(np.asarray(image).tobytes()).hexdigest()


@in_a_browser
def test_what_a_browser_sees_otherwise_is_said_or_refused(page, tmp_path: Path):
    driver, _ = page
    photo = draw_photo(1)
    photo.save(
        tmp_path / "moving.avif", save_all=True, append_images=[draw_photo(2), draw_photo(3)]
    )
    Image.merge("RGBA", (*photo.split(), photo.convert("L"))).save(tmp_path / "glass.png")
    photo.quantize().save(hole := tmp_path / "hole.gif", transparency=3)
    within = bytearray(hole.read_bytes())
    within[6:10] = struct.pack("<HH", *(edge + 9 for edge in photo.size))  # a larger canvas
    (tmp_path / "within.gif").write_bytes(within)
    (tmp_path / "bits.bmp").write_bytes(bmp_of_16_bits())
    names = {
        "moving.avif": "animated AVIF",
        "glass.png": "transparent",
        "hole.gif": "transparent",
        "within.gif": "",
        "bits.bmp": "BMP of 16 bits, which browsers scale otherwise",
    }
    for (text, details), (name, note) in zip(
        reversed(pick(driver, [tmp_path / name for name in names])), names.items(), strict=True
    ):
        assert text and f"perhaps not as in Python: {note}" in details and name in details


def bmp_of_16_bits() -> bytes:
    pixels = np.random.default_rng(0).integers(0, 1 << 15, (60, 80), np.uint16).tobytes()
    header = struct.pack("<IiiHHIIiiII", 40, 80, 60, 1, 16, 0, len(pixels), 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54 + len(pixels), 0, 0, 54) + header + pixels


def test_probes_are_what_pillow_sees_in_them():
    script = (PAGE / "probes.js").read_text(encoding="utf-8")
    probes = re.findall(r'checksum: (-?\d+),\s+file: "([^"]+)"', script)
    assert len(probes) == 4
    for checksum, file in probes:
        image, total = load_image(base64.b64decode(file)), 0
        for value in np.asarray(image).ravel().tolist():
            total = (31 * total + value) % (1 << 32)
        assert total == int(checksum) % (1 << 32)


@in_a_browser
def test_a_browser_that_decodes_otherwise_is_found_by_trying(
    page, small_site: Path, tmp_path: Path
):
    driver, _ = page
    shutil.copytree(small_site, other := tmp_path / "site")
    script = (other / "probes.js").read_text(encoding="utf-8")
    (other / "probes.js").write_text(re.sub(r"(checksum: -?)\d+", r"\g<1>1", script))
    draw_photo(1).save(tmp_path / "a.avif")
    draw_photo(1).save(tmp_path / "a.png")
    with served(other) as server, new_tab(driver):
        visit(driver, server)
        png, avif = pick(driver, [tmp_path / "a.avif", tmp_path / "a.png"])
    assert "perhaps not as in Python: AVIF, which this browser decodes otherwise" in avif[1]
    assert "Python" not in png[1]
    driver.get_log("browser")  # that the page is not kept for later


def test_webkit_sees_what_pillow_sees_or_says_otherwise(webkit, site: Path, tmp_path: Path):
    photos = photos_of_all_kinds(tmp_path / "photos")
    photos += sorted(ORIGINALS.glob("*.jpg"))[:16]
    draw_photo(1).save(avif := tmp_path / "a.avif")
    breaks_off(cut := tmp_path / "cut.jpg", "JPEG")
    draw_photo(1).save(flipped := tmp_path / "flipped.png")
    content = bytearray(flipped.read_bytes())
    content[len(content) // 2] ^= 1
    flipped.write_bytes(content)
    with served(site) as server:
        visit(webkit, server)
        *said, other, short, damaged = decoded(webkit, [*photos, avif, cut, flipped])
        assert [*map(tuple, said)] == [(*pillows(path), None) for path in photos]
        assert other[3] or other[:3] == [*pillows(avif)]
        assert short == "the file breaks off before its end"
        assert damaged.startswith("damaged")
        shown = pick(webkit, photos[:3])[::-1]
        assert [text for text, _ in shown] == python_captions(site, photos[:3])
        assert server.violations == []


def breaks_off(path: Path, kind: str) -> Path:
    draw_photo(1).save(path, kind)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


@in_a_browser
def test_errors_name_the_file_and_the_rest_goes_on(page, tmp_path: Path):
    driver, _ = page
    draw_photo(1).save(good := tmp_path / "good.jpg")
    photo = good.read_bytes()
    draw_photo(1).save(tmp_path / "scan.tiff")
    dark = np.asarray(draw_photo(1).convert("L")).astype(np.uint16) * 16
    Image.fromarray(dark).save(tmp_path / "dark.png")
    draw_photo(1, (2020, 20)).save(tmp_path / "strip.png")
    draw_photo(1).save(png := tmp_path / "bomb.png")
    bomb = bytearray(png.read_bytes())
    bomb[16:24] = struct.pack(">II", 30000, 30000)
    heic = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(500)
    for kind in ("JPEG", "PNG", "GIF", "BMP", "WebP"):
        breaks_off(tmp_path / f"cut.{kind}", kind)
    for name, content in {
        "words.jpg": b"these are no pixels",
        "empty.jpg": b"",
        "<img src=x onerror=alert(1)>.jpg": b"no",
        "phone.heic": heic,
        "bomb.png": bytes(bomb),
        "bomb.jpg": photo[: (at := photo.index(b"\xff\xc0") + 5)] + b"\xff" * 4 + photo[at + 4 :],
    }.items():
        (tmp_path / name).write_bytes(content)
    reasons = {
        **{f"cut.{kind}": "breaks off" for kind in ("JPEG", "PNG", "GIF", "BMP", "WebP")},
        "words.jpg": "damaged, or no image",
        "empty.jpg": "the file is empty",
        "<img src=x onerror=alert(1)>.jpg": "damaged, or no image",
        "phone.heic": "cannot read HEIC; save it as JPEG",
        "scan.tiff": "cannot read TIFF; save it as JPEG",
        "bomb.png": "30000x30000 are more than 64 megapixels",
        "bomb.jpg": "65535x65535 are more than 64 megapixels",
        "dark.png": "brightness is uncertain",
        "strip.png": "too elongated",
    }
    shown = pick(driver, [tmp_path / name for name in reasons] + [good])
    assert status(driver) == f"1 photo captioned, {len(reasons)} could not be"
    assert "good.jpg" in shown[0][1]
    for (text, _), (name, reason) in zip(reversed(shown[1:]), reasons.items(), strict=True):
        assert text.startswith(f"{name}: ") and reason in text


@in_a_browser
def test_it_works_offline_and_a_new_export_replaces_the_old(
    page, small_site: Path, site: Path, tmp_path: Path
):
    draw_photo(1).save(photo := tmp_path / "photo.png")
    old, new = python_captions(small_site, [photo]), python_captions(site, [photo])
    assert old != new
    driver, _ = page
    with new_tab(driver):
        with served(small_site) as server:
            visit(driver, server)
            wait(driver, lambda: "without a network" in status(driver))
        driver.refresh()
        wait(driver, lambda: "Ready" in status(driver))
        assert [text for text, _ in pick(driver, [photo])] == old
        with served(site, port=server.server_port):
            visit(driver, server)  # still the old one, while the new one is fetched
            wait(driver, lambda: driver.execute_async_script(CACHES) == [version(site)])
        driver.get(server.url + "index.html?from=home")
        wait(driver, lambda: "Ready" in status(driver))
        assert [text for text, _ in pick(driver, [photo])] == new


CACHES = """
const versions = (names) => names.map((name) => name.split(" ").at(-1));
caches.keys().then(versions).then(arguments[0]);
"""


def version(site: Path) -> str:
    script = (site / "service-worker.js").read_text(encoding="utf-8")
    return re.search(r'VERSION = "([0-9a-f]{16})"', script)[1]


@in_a_browser
def test_a_policy_that_forbids_webassembly_is_noticed(page, small_site: Path):
    """As a check on how violations are looked for."""
    driver, _ = page
    policy = POLICY.replace("'wasm-unsafe-eval'", "")
    with served(small_site, policy=policy) as server, new_tab(driver):
        driver.get(server.url)
        wait(driver, lambda: "cannot be loaded" in status(driver))
        assert not driver.find_element(By.ID, "files").is_enabled()
        driver.execute_async_script(BRING, "drop", "DragEvent", "dataTransfer")
        assert driver.find_element(By.ID, "doing").text == ""  # and not "2 waiting", for ever
        assert "script-src" in {report["effective-directive"] for report in server.violations}
    driver.get_log("browser")  # its complaints are no other test's


ALONE = """
const done = arguments[0];
const draw = () => {
  const pixels = new Uint8ClampedArray(300 * 200 * 4).map((_, at) => at % 4 === 3 ? 255 : at % 251);
  return new ImageData(pixels, 300, 200);
};
import("./captioner.js").then(async ({ Captioner }) => {
  const captioner = await Captioner.load();
  const canvas = document.createElement("canvas");
  const images = [draw(), new Blob(["no photo"]), "photo.jpg", canvas, draw()];
  const asked = await Promise.allSettled(images.map((image) => captioner.caption(image)));
  const said = asked.map(({ value, reason }) => value ?? reason.message);
  captioner.close();
  const closed = await captioner.caption(draw()).catch((error) => error.message);
  const lost = await Captioner.load("lost.onnx").catch((error) => error.message);
  const other = await Captioner.load("LICENSES.txt").catch((error) => error.message);
  return [...said, closed, lost, other];
}).then(done, (error) => done(String(error)));
"""


@in_a_browser
def test_captioner_js_is_usable_alone(page):
    driver, _ = page
    said = driver.execute_async_script(ALONE)
    first, blob, text, canvas, last, closed, lost, other = said
    site = page[1].folder
    pixels = np.array([i % 251 for i in range(300 * 200 * 4)], np.uint8).reshape(200, 300, 4)
    session = onnxruntime.InferenceSession(site / "captioner.onnx")
    tokens, words, log_probability = session.run(None, {"image": pixels[..., :3].copy()})
    assert (first["text"], first["tokens"]) == (" ".join(words), tokens.tolist())
    assert first["logProbability"] == pytest.approx(float(log_probability), abs=1e-3)
    assert (first["width"], first["height"]) == (300, 200) and first["milliseconds"] > 0
    assert last["text"] == first["text"]
    assert blob == "image: damaged, or no image that this browser can read"
    wanted = "image: no Blob, File, ImageData, ImageBitmap, but "
    assert text == f"{wanted}String; createImageBitmap() takes elements"
    assert canvas.startswith(f"{wanted}HTMLCanvasElement; ")
    assert closed == "the captioner is closed"
    assert lost.endswith("lost.onnx: cannot be loaded (404)")
    assert "/LICENSES.txt: Can't create a session" in other
    driver.get_log("browser")  # its complaints are no other test's


@in_a_browser
def test_a_page_that_cannot_start_says_what_it_needs(page):
    driver, server = page
    assert driver.find_elements(By.ID, "idle") == []
    with new_tab(driver):
        driver.get((server.folder / "index.html").as_uri())
        idle = driver.find_element(By.ID, "idle")
        wait(driver, idle.is_displayed)
        assert "web server" in idle.text
    driver.get_log("browser")


@in_a_browser
def test_the_readmes_javascript_captions(page, small_site: Path, tmp_path: Path):
    driver, _ = page
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    [snippet] = re.findall(r"```javascript\n(.*?)```", readme, re.DOTALL)
    assert len(snippet.splitlines()) <= 20
    shutil.copytree(small_site, mine := tmp_path / "site")
    (mine / "mine.js").write_text(snippet, encoding="utf-8")
    html = (
        '<link rel="icon" href="icon.svg"><input type="file"><script type="module" src="mine.js">'
    )
    (mine / "mine.html").write_text(html + "</script>", encoding="utf-8")
    draw_photo(2).save(photo := tmp_path / "photo.jpg")
    with served(mine) as server, new_tab(driver):
        driver.get(f"{server.url}mine.html")
        said: list[str] = []

        def logged() -> bool:  # the photo may be picked before the script listens
            driver.execute_script("document.querySelector('input').value = ''")
            driver.find_element(By.TAG_NAME, "input").send_keys(str(photo))
            said.extend(entry["message"] for entry in driver.get_log("browser"))
            return bool(said)

        wait(driver, logged)
    [text] = python_captions(mine, [photo])
    assert f'"{text}"' in said[0]


@in_a_browser
def test_the_page_stays_responsive_with_a_large_photo(page, tmp_path: Path):
    driver, _ = page
    draw_photo(5, (6000, 4000)).save(photo := tmp_path / "large.jpg")
    driver.execute_script(
        "window.ticks = 0; window.ticking = setInterval(() => (window.ticks += 1), 20)"
    )
    [(text, details)] = pick(driver, [photo])
    assert [text] == python_captions(page[1].folder, [photo])
    assert "6000 \u00d7 4000" in details
    assert driver.execute_script("clearInterval(window.ticking); return window.ticks") > 5


@in_a_browser
@pytest.mark.parametrize(
    ("event", "event_type", "field"),
    [("drop", "DragEvent", "dataTransfer"), ("paste", "ClipboardEvent", "clipboardData")],
)
def test_photos_are_taken_in(page, event: str, event_type: str, field: str):
    driver, _ = page
    before = len(items(driver))
    driver.execute_async_script(BRING, event, event_type, field)
    wait(driver, lambda: len(items(driver)) == before + 2)
    assert [details.split(",")[0] for _, details in items(driver)[:2]] == ["2.png", "1.png"]


BRING = """
const [event, type, field, done] = arguments;
const canvas = new OffscreenCanvas(60, 50);
canvas.getContext("2d").fillRect(0, 0, 60, 50);
canvas.convertToBlob().then((blob) => {
  const data = new DataTransfer();
  for (const name of ["1.png", "2.png"]) data.items.add(new File([blob], name));
  const options = { [field]: data, bubbles: true, cancelable: true };
  done(document.body.dispatchEvent(new window[type](event, options)));
});
"""


@in_a_browser
def test_a_queue_can_be_stopped(page, tmp_path: Path):
    driver, _ = page
    paths = [tmp_path / f"{seed}.png" for seed in range(40)]
    for seed, path in enumerate(paths):
        draw_photo(seed).save(path)
    before = len(items(driver))
    driver.find_element(By.ID, "files").send_keys("\n".join(map(str, paths)))
    wait(driver, lambda: len(items(driver)) > before)
    assert " of 40: " in driver.find_element(By.ID, "doing").text
    assert driver.find_element(By.ID, "progress").get_attribute("max") == "40"
    driver.find_element(By.ID, "stop").click()
    wait(driver, lambda: "captioned" in status(driver))
    shown = len(items(driver)) - before
    assert 0 < shown < 40 and status(driver).startswith(f"{shown} photo")
    assert focused(driver) == "files"
    assert not driver.find_element(By.ID, "stop").is_displayed()


@in_a_browser
def test_the_keyboard_is_enough(page, tmp_path: Path):
    driver, server = page
    driver.execute_cdp_cmd(
        "Browser.grantPermissions",
        {"origin": server.url, "permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]},
    )
    draw_photo(1).save(tmp_path / "photo.jpg")
    [(text, _)] = pick(driver, [tmp_path / "photo.jpg"])
    driver.execute_script(
        "window.asked = 0; const [files, start] = [document.getElementById('files'), "
        "document.querySelector('h1')]; start.tabIndex = -1; start.focus(); files.addEventListener("
        "'click', (event) => { window.asked += 1; event.preventDefault(); }, { once: true })"
    )
    press(driver, Keys.TAB)
    assert focused(driver) == "files"
    outlined = "return getComputedStyle(document.querySelector('label')).outlineStyle"
    assert driver.execute_script(outlined) == "solid"
    press(driver, Keys.ENTER)
    assert driver.execute_script("return window.asked") == 1
    press(driver, Keys.TAB)
    assert focused(driver) == "copy"
    press(driver, Keys.ENTER)
    wait(driver, lambda: status(driver) == "Copied")
    button = driver.find_element("class name", "copy")
    assert button.get_attribute("aria-label") == f"{button.text}: {text}" == f"Copied: {text}"
    assert driver.execute_async_script("navigator.clipboard.readText().then(arguments[0])") == text


def press(driver: webdriver.Chrome, key: str) -> None:
    webdriver.ActionChains(driver).send_keys(key).perform()


def focused(driver: webdriver.Chrome) -> str:
    return driver.execute_script(
        "return document.activeElement.id || document.activeElement.className"
    )


@in_a_browser
def test_screen_readers_are_told_what_is_there(page, tmp_path: Path):
    driver, _ = page
    draw_photo(1).save(tmp_path / "photo.jpg")
    [(text, details)] = pick(driver, [tmp_path / "photo.jpg"])
    nodes = driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    told = {
        (node["role"]["value"], node.get("name", {}).get("value", ""))
        for node in nodes
        if not node["ignored"]
    }
    assert {
        ("heading", "Photo captions"),
        ("button", "Choose photos"),
        ("heading", "Captions, newest first"),
        ("list", "Captions, newest first"),
        ("StaticText", text),
        ("StaticText", details),
        ("button", f"Copy: {text}"),
        ("StaticText", "1 photo captioned"),
    } <= told
    live = "[role=status], [aria-live=polite]"
    ids = f"return [...document.querySelectorAll('{live}')].map((element) => element.id)"
    assert driver.execute_script(ids) == ["status", "results"]


@pytest.fixture(scope="module")
def axe(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The rules that others judge accessibility by, contrast among them."""
    folder = tmp_path_factory.mktemp("axe")
    if (npm := shutil.which("npm")) is None:
        pytest.skip(f"npm, which fetches {AXE}, is not installed")
    done = subprocess.run([npm, "pack", AXE, "--silent"], cwd=folder, capture_output=True)
    if done.returncode:
        pytest.skip(f"npm cannot fetch {AXE}")
    with tarfile.open(next(folder.glob("*.tgz"))) as archive:
        return archive.extractfile("package/axe.min.js").read().decode()


@in_a_browser
def test_axe_finds_no_fault_on_a_phone(page, axe: str, tmp_path: Path):
    driver, _ = page
    phone = {"width": 320, "height": 640, "deviceScaleFactor": 2, "mobile": True}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    draw_photo(1).save(tmp_path / f"{'long' * 20}.jpg")
    (tmp_path / "broken.jpg").write_bytes(b"broken")
    pick(driver, sorted(tmp_path.iterdir()))
    driver.execute_script(axe)
    for scheme, is_dark in {"light": False, "dark": True}.items():
        preferred = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", preferred)
        colour = driver.execute_script("return getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", colour))) < 300) == is_dark
        found = driver.execute_async_script("axe.run().then(arguments[0])")
        assert {rule["id"] for rule in found["passes"]} >= {"color-contrast", "label", "list"}
        assert [(rule["id"], rule["nodes"]) for rule in found["violations"]] == []
    assert driver.execute_script("return document.scrollingElement.scrollWidth") <= 320
    driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


@pytest.mark.parametrize(
    ("arguments", "path", "reason"),
    [
        (["--runtime", ".."], None, "holds no ort.wasm.bundle.min.mjs; pass --runtime DIR"),
        ([], "", "npm, which fetches onnxruntime-web@"),
        (["--runtime", "dist"], None, "bundle.min.mjs: of another version; pass --runtime DIR"),
        (["no-such-folder"], None, "no-such-folder"),
    ],
)
def test_refusals_are_one_line_and_leave_nothing(
    arguments: list[str], path: str | None, reason: str, tmp_path: Path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    if path is not None:
        monkeypatch.setenv("PATH", path)
    (tmp_path / "dist").mkdir()
    for name in ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm"):
        (tmp_path / "dist" / name).write_bytes(b"")
    assert main(["web", *arguments, "--out", "made/site"]) == 2
    error = capsys.readouterr().err
    assert reason in error and error.count("\n") == 1
    assert {file.name for file in tmp_path.rglob("*")} <= {
        "dist", "made", "ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([str(COMMITTED / "opt")], "one file holds a CNN-LSTM"),
        ([str(COMMITTED / "cnn-lstm"), "--precision", "w8"], "int8"),
    ],
)
def test_artifacts_that_no_page_holds_are_refused(
    runtime: Path, arguments: list[str], reason: str, tmp_path: Path, capsys
):
    out = ["--runtime", str(runtime), "--out", str(tmp_path / "site")]
    assert main(["web", *arguments, *out]) == 2
    error = capsys.readouterr().err
    assert reason in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_an_npm_that_says_why_it_cannot_fetch_is_quoted(tmp_path: Path, monkeypatch, capsys):
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed")
    monkeypatch.setenv("npm_config_registry", "http://127.0.0.1:9")
    monkeypatch.setenv("npm_config_fetch_retries", "0")
    monkeypatch.setenv("npm_config_cache", str(tmp_path / "cache"))
    assert main(["web", "--out", str(tmp_path / "site")]) == 2
    error = capsys.readouterr().err
    assert "ECONNREFUSED" in error and error.count("\n") == 1


def test_an_npm_that_brings_something_else_is_refused(tmp_path: Path, monkeypatch, capsys):
    script = "#!/bin/sh\nprintf other > onnxruntime-web-1.30.0.tgz\n"
    (npm := tmp_path / "npm").write_text(script)
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert main(["web", "--out", str(tmp_path / "site")]) == 2
    error = capsys.readouterr().err
    assert "another onnxruntime-web@1.30.0 than the known one" in error
    npm.write_text("#!/bin/sh\necho 'network is unreachable' >&2\nexit 1\n")
    assert main(["web", "--out", str(tmp_path / "site")]) == 2
    error = capsys.readouterr().err
    assert "network is unreachable; pass --runtime DIR" in error and error.count("\n") == 1
    assert not (tmp_path / "site").exists()


def test_the_command_says_what_it_wrote(runtime: Path, tmp_path: Path, capsys):
    out = tmp_path / "site"
    arguments = [str(COMMITTED / "cnn-lstm"), "--num-beams", "2", "--runtime", str(runtime)]
    assert main(["web", *arguments, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "(fp32)" in printed and "16 of 16 captions identical" in printed
    assert {file.name for file in out.iterdir()} == {file.name for file in PAGE.iterdir()} | {
        "captioner.onnx", "onnxruntime.js", "onnxruntime.wasm",
    }  # fmt: skip
    script = (out / "service-worker.js").read_text(encoding="utf-8")
    files = json.loads(re.search(r"FILES = (\{.*?\});", script, re.DOTALL)[1])
    for name, integrity in files.items():
        content = (out / ("index.html" if name == "./" else name)).read_bytes()
        digest = base64.b64encode(hashlib.sha256(content).digest()).decode()
        assert integrity == f"sha256-{digest}"
    assert len(files) == len(list(out.iterdir())) - 1
    assert main(["web", "--out", str(out)]) == 2
    assert "already there" in capsys.readouterr().err
