"""The web page with photos on it, as a picture, and how long its captions took."""

from __future__ import annotations

import argparse
import functools
import http.server
import io
import re
import shutil
import statistics
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from capexport.bench.cli import sample_photos
from capexport.bench.report import cpu_model
from capexport.captioner import BUNDLED_ARTIFACT
from capexport.cli import run_parser, teaching
from capexport.errors import MissingExtraError, importing
from capexport.web import write_site

if TYPE_CHECKING:
    from selenium.webdriver.remote.webdriver import WebDriver


def main(argv: list[str] | None = None) -> int:
    """Run it; returns its exit code, 2 where it cannot be run."""
    parser = argparse.ArgumentParser(
        prog="page.py",
        **teaching(
            "Caption scikit-image's photos on the page of `capexport web`, in Chromium; draw it, "
            "and print how long captions took there. Needs Debian's packages chromium and "
            "chromium-driver, and npm.",
            "python benchmarks/page.py --picture benchmarks/page.png",
        ),
    )
    parser.add_argument(
        "--artifact", type=Path, default=BUNDLED_ARTIFACT, metavar="DIR",
        help="exported CNN-LSTM (default: the bundled captioner)",
    )  # fmt: skip
    parser.add_argument("--runtime", type=Path, metavar="DIR", help="as of `capexport web`")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="where to draw the page")
    return run_parser(parser, _draw, argv)


def _draw(options: argparse.Namespace) -> int:
    with importing("the page is drawn with `pip install selenium`"):
        from selenium import webdriver
    if not (driver := shutil.which("chromedriver")):
        raise MissingExtraError("there is no chromedriver; install chromium and chromium-driver")
    flags = webdriver.ChromeOptions()
    flags.binary_location = shutil.which("chromium") or ""
    for flag in ("--headless=new", "--no-sandbox", "--hide-scrollbars", "--window-size=760,1300"):
        flags.add_argument(flag)
    photos = sample_photos()
    with tempfile.TemporaryDirectory() as folder:
        site = write_site(options.artifact, Path(folder, "site"), runtime=options.runtime)
        host = functools.partial(_Silent, directory=str(Path(folder, "site")))
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), host)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with webdriver.Chrome(flags, webdriver.ChromeService(driver)) as browser:
            version = browser.capabilities["browserVersion"]
            browser.get(f"http://127.0.0.1:{server.server_port}/")
            took = _caption(browser, photos * 5)[: -2 * len(photos)]  # without those that warm up
            browser.refresh()
            _caption(browser, photos)
            if options.picture:
                _save(browser.get_screenshot_as_png(), options.picture)
        server.shutdown()
    print(f"{cpu_model()}, Chromium {version}, {len(took)} captions")
    print(f"a page of {sum(site.sizes.values()) / 1e6:.1f} MB")
    print(f"a caption: {statistics.median(took):.0f} ms, decoding included (median)")
    return 0


class _Silent(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass


def _caption(browser: WebDriver, photos: Sequence[Path]) -> list[int]:
    """Have the page caption photos; the milliseconds that it says, newest first."""
    from selenium.webdriver.support.wait import WebDriverWait

    browser.find_element("id", "files").send_keys("\n".join(map(str, photos)))
    WebDriverWait(browser, 300).until(
        lambda _: " captioned" in browser.find_element("id", "status").text
    )
    details = [item.text for item in browser.find_elements("class name", "details")]
    return [int(re.findall(r"(\d+) ms", text)[0]) for text in details]


def _save(png: bytes, path: Path) -> None:
    """As few bytes as 256 colours take."""
    picture = Image.open(io.BytesIO(png)).convert("RGB").quantize(256)
    picture.save(path, optimize=True)


if __name__ == "__main__":
    raise SystemExit(main())
