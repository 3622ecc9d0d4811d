"""The web page in a real browser: Chromium, headless."""

import contextlib
import functools
import http.server
import io
import json
import os
import shutil
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
POLICY = "default-src 'self'; script-src 'self' 'wasm-unsafe-eval'; report-uri /violation"
AXE = "axe-core@4.10.3"

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


@pytest.fixture(scope="module")
def page(site: Path) -> Iterator[tuple[webdriver.Chrome, Server]]:
    """The page of the bundled captioner, open and ready."""
    with served(site) as server, browsing() as driver:
        visit(driver, server)
        yield driver, server


def visit(driver: webdriver.Chrome, server: Server) -> None:
    driver.get(server.url)
    wait(driver, lambda: "Ready" in status(driver))


def wait(driver: webdriver.Chrome, condition, seconds: float = 120) -> None:
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
    frames = [draw_photo(seed) for seed in (8, 9)]
    for name, (image, options) in {
        "plain.jpg": (photo, {}),
        "profile.jpg": (photo, {"icc_profile": profile, "subsampling": 0}),
        "progressive.jpg": (photo, {"progressive": True}),
        "grey.jpg": (photo.convert("L"), {}),
        "cmyk.jpg": (photo.convert("CMYK"), {}),
        "upside-down.jpg": (photo, {"exif": exif[3]}),
        "turned.jpg": (photo, {"exif": exif[6]}),
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
def test_captions_are_pythons_and_nothing_leaves_the_page(site: Path, tmp_path: Path):
    photos = photos_of_all_kinds(tmp_path / "photos")
    photos += sorted(ORIGINALS.glob("*.jpg"))[:8]
    log = tmp_path / "requests.json"
    with served(site) as server:
        with browsing(f"--log-net-log={log}") as driver:
            visit(driver, server)
            shown = pick(driver, photos)[::-1]
            wait(driver, lambda: driver.execute_script(CONTROLLED))
            complaints = driver.get_log("browser")
        assert server.violations == []
    assert complaints == []
    assert [text for text, _ in shown] == python_captions(site, photos)
    assert len({text for text, _ in shown}) > 4
    assert all(p.name in details and "ms" in details for p, (_, details) in zip(photos, shown, strict=True))  # fmt: skip
    asked = [
        event["params"]["url"]
        for event in json.loads(log.read_text())["events"]
        if "127.0.0.1" in event.get("params", {}).get("initiator", "")
        and "url" in event["params"]
    ]  # fmt: skip
    assert any(url.endswith("captioner.onnx") for url in asked)
    assert [url for url in asked if not url.startswith(server.url)] == []


CONTROLLED = "return Boolean(navigator.serviceWorker.controller)"
