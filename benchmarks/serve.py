"""`capexport serve` under load: every answer checked, and how fast, against `capexport caption`."""

from __future__ import annotations

import argparse
import base64
import contextlib
import itertools
import json
import os
import re
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from PIL import Image
from tqdm import tqdm

from capexport.bench.cli import add_inputs, add_outputs, chosen_photos, write_outputs
from capexport.bench.report import environment, table
from capexport.bulk.outputs import FileOutput
from capexport.bulk.run import caption_files, open_captioner
from capexport.captioner import model_folder
from capexport.cli import run_parser, teaching
from capexport.sessions import available_cores

BAD_EVERY = 20  # of so many requests one is bad
PAUSE = 0.5  # seconds between two contenders
HEAD = "POST {} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {}\r\n\r\n"


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; returns its exit code, 2 where it cannot be run."""
    return run_parser(_parser(), _benchmark, argv)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="serve.py",
        **teaching(
            "Send requests of three protocols, bad ones among them, from many clients at once to "
            "`capexport serve`, check every answer, and measure images a second against what "
            "`capexport caption` does with the same files, in turn. The last line of standard "
            "output is JSON; the exit code is 1 where an answer was wrong.",
            "python benchmarks/serve.py --photos flickr8k/Images",
            "python benchmarks/serve.py --photos photos/ --clients 8 --requests 500 --rounds 1",
        ),
    )
    parser.add_argument(
        "-m", "--model", metavar="DIR", help="exported folder (default: the bundled one)"
    )
    add_inputs(
        parser,
        requests=(2000, "requests a round"),
        clients=(32, "clients that ask at the same time, one request after the other"),
        rounds=(3, "timed rounds, of which medians are reported"),
        threads=(None, "CPU threads of both sides"),
    )
    add_outputs(parser)
    return parser


def _benchmark(options: argparse.Namespace) -> int:
    threads = options.threads or available_cores()
    if min(options.requests, options.clients, options.rounds, threads) < 1:
        raise ValueError("--requests, --clients, --rounds and --threads must be at least 1")
    photos = chosen_photos(options)
    model = model_folder(options.model)
    captioner = open_captioner(model, threads=threads)
    wanted = [caption.text for caption in captioner.caption(photos)]
    requests = make_requests([photo.read_bytes() for photo in photos], wanted, options.requests)
    good = sum(request.status == 200 for request in requests)
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder, serving(model, threads) as (address, process):
        paths = files_of(requests, Path(folder))
        names = itertools.count()

        def bulk() -> None:
            out = Path(folder) / f"{next(names)}.jsonl"
            output = FileOutput(out, "jsonl", paths, "", resume=False)
            for _ in caption_files(captioner, paths, output, batch_size=32, workers=threads):
                pass

        measured = measure(bulk, address, process, requests, options.clients, options.rounds)
    result = {
        "model": repr(captioner),
        "photos": len(photos),
        "photo": photo_of_the_middle(photos),
        "requests": len(requests),
        "bad_requests": len(requests) - good,
        "clients": options.clients,
        "rounds": options.rounds,
        "environment": vars(environment(threads)),
        "load_average": {"before": load, "after": os.getloadavg()[0]},
        **measured,
    }
    write_outputs(options, render(result), result)
    return 1 if result["wrong"] or result["lost"] else 0


def photo_of_the_middle(photos: Sequence[Path]) -> dict[str, int]:
    """Width, height and kilobytes of the photo whose file is of medium size."""
    photo = sorted(photos, key=lambda path: path.stat().st_size)[len(photos) // 2]
    with Image.open(photo) as image:
        width, height = image.size
    return {"width": width, "height": height, "kilobytes": photo.stat().st_size // 1000}


@dataclass(frozen=True)
class Request:
    """What is sent, and the status and, where it is 200, the caption that must come back."""

    path: str
    image: bytes
    body: bytes
    status: int
    caption: str = ""

    def text(self, answer: Any) -> str:
        """The caption in an answer."""
        if self.path == "/caption":
            return str(answer["text"])
        if self.path == "/api/generate":
            return str(answer["response"])
        return str(answer["choices"][0]["message"]["content"])


def make_requests(photos: Sequence[bytes], captions: Sequence[str], count: int) -> list[Request]:
    """Of all three protocols in turn, and a bad one after each `BAD_EVERY - 1`."""
    kinds = itertools.cycle(["/caption", "/api/generate", "/v1/chat/completions"])
    pairs = itertools.cycle(zip(photos, captions, strict=True))
    requests = []
    for number in range(1, count + 1):
        path = next(kinds)
        if number % BAD_EVERY == 0:
            photo = next(pairs)[0]
            broken = photo[: len(photo) // 3] if number % 2 else b"no image"
            requests.append(Request(path, broken, _body(path, broken), 400))
        else:
            photo, caption = next(pairs)
            requests.append(Request(path, photo, _body(path, photo), 200, caption))
    return requests


def files_of(requests: Sequence[Request], folder: Path) -> list[Path]:
    """A file in `folder` with the image of each request, bad ones among them."""
    files: dict[bytes, Path] = {}
    for image in {request.image for request in requests}:
        files[image] = folder / f"{len(files)}.jpg"
        files[image].write_bytes(image)
    return [files[request.image] for request in requests]


def _body(path: str, photo: bytes) -> bytes:
    if path == "/caption":
        return photo
    text = base64.b64encode(photo).decode()
    content: dict[str, Any] = {"model": "capexport", "stream": False}
    if path == "/api/generate":
        content |= {"prompt": "Describe this image.", "images": [text]}
    else:
        part = {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{text}"}}
        content["messages"] = [{"role": "user", "content": [part]}]
    return json.dumps(content).encode()


@contextlib.contextmanager
def serving(model: Path, threads: int) -> Iterator[tuple[str, psutil.Process]]:
    """A server in a process of its own, and its address."""
    command = [sys.executable, "-m", "capexport", "serve", "-m", str(model), "--port", "0"]
    command += ["--threads", str(threads)]
    with tempfile.TemporaryFile("w+") as errors, psutil.Popen(command, stderr=errors) as process:
        try:
            found = None
            while not found:
                if process.poll() is not None:
                    errors.seek(0)
                    raise RuntimeError(f"the server did not start: {errors.read().strip()[-500:]}")
                time.sleep(0.05)
                errors.seek(0)
                found = re.search(r"http://(\S+)", errors.read())
            yield found[1], process
        finally:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.terminate()


@dataclass
class Answers:
    """What a round of requests came to; `seconds` are those of good requests."""

    seconds: list[float] = field(default_factory=list)
    wrong: int = 0
    lost: int = 0


def ask(address: str, requests: Sequence[Request], clients: int) -> Answers:
    """Send all requests, each client one after the other on a connection of its own."""
    answers, queue = Answers(), iter(requests)
    host, port = address.split(":")
    lock = threading.Lock()

    def client(_: int) -> None:
        connection = socket.create_connection((host, int(port)), timeout=120)
        while True:
            with lock:
                request = next(queue, None)
            if request is None:
                return connection.close()
            began = time.perf_counter()
            try:
                status, content = exchange(connection, request)
            except OSError:
                connection.close()
                connection = socket.create_connection((host, int(port)), timeout=120)
                with lock:
                    answers.lost += 1
                continue
            seconds = time.perf_counter() - began
            right = status == request.status
            if right and request.caption:
                right = request.text(json.loads(content)) == request.caption
            with lock:
                answers.wrong += not right
                if request.caption:
                    answers.seconds.append(seconds)

    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(client, range(clients)))
    return answers


def exchange(connection: socket.socket, request: Request) -> tuple[int, bytes]:
    """Status and content of the answer. `http.client` would take twice the server's cores."""
    head = HEAD.format(request.path, len(request.body)).encode()
    connection.sendall(head + request.body)
    answer, length = b"", 0
    while not length or len(answer) < length:
        if not (data := connection.recv(65536)):
            raise ConnectionError("the server has closed the connection")
        answer += data
        if not length and (end := answer.find(b"\r\n\r\n") + 4) > 3:
            length = end + int(answer[:end].lower().partition(b"content-length:")[2].split()[0])
    return int(answer[9:12]), answer[end:length]


def measure(
    bulk: Callable[[], None],
    address: str,
    process: psutil.Process,
    requests: Sequence[Request],
    clients: int,
    rounds: int,
) -> dict[str, Any]:
    """Both in turn, after an untimed round of each."""
    good = sum(request.status == 200 for request in requests)
    rates: dict[str, list[float]] = {"caption": [], "serve": []}
    cpu: dict[str, list[float]] = {"caption": [], "serve": [], "clients": []}
    seconds: list[float] = []
    memory: list[float] = []
    totals: Counter[str] = Counter()

    def load() -> None:
        answers = ask(address, requests, clients)
        totals.update(wrong=answers.wrong, lost=answers.lost, answered=len(requests))
        seconds.extend(answers.seconds)

    order: list[tuple[str, Callable[[], None]]] = [("caption", bulk), ("serve", load)]
    for number in tqdm(range(rounds + 1), "rounds", disable=None):
        for name, run in order:
            time.sleep(PAUSE)
            began, busy, served = time.perf_counter(), time.process_time(), _busy(process)
            run()
            if number:
                rates[name].append(good / (time.perf_counter() - began))
                here = 1e3 * (time.process_time() - busy) / good
                cpu["caption" if name == "caption" else "clients"].append(here)
                if name == "serve":
                    cpu["serve"].append(1e3 * (_busy(process) - served) / good)
        memory.append(process.memory_info().rss / 1e6)
        if not number:
            seconds.clear()
        order.reverse()
    return {**_medians(rates, cpu, memory, seconds), **totals}


def _medians(
    rates: dict[str, list[float]],
    cpu: dict[str, list[float]],
    memory: list[float],
    seconds: list[float],
) -> dict[str, Any]:
    """Of all rounds; ratios are taken within each."""
    ratios = [serve / caption for caption, serve in zip(*rates.values(), strict=True)]
    parts = statistics.quantiles(seconds, n=100)
    return {
        "images_per_second": {name: statistics.median(values) for name, values in rates.items()},
        "cpu_milliseconds": {name: statistics.median(values) for name, values in cpu.items()},
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "milliseconds": {"p50": 1e3 * parts[49], "p95": 1e3 * parts[94]},
        "megabytes": {"after the first round": memory[0], "after the last": memory[-1]},
    }


def _busy(process: psutil.Process) -> float:
    """Seconds of CPU time that a process has had."""
    times = process.cpu_times()
    return float(times.user + times.system)


def render(result: dict[str, Any]) -> str:
    rates, times, held = (result[k] for k in ("images_per_second", "milliseconds", "megabytes"))
    cpu, photo = result["cpu_milliseconds"], result["photo"]
    machine, load = result["environment"], result["load_average"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    rows = [
        ("", "capexport caption", "capexport serve"),
        ("images a second", f"{rates['caption']:.0f}", f"{rates['serve']:.0f}"),
        ("CPU time an image (ms)", f"{cpu['caption']:.1f}",
         f"{cpu['serve']:.1f}, and the clients {cpu['clients']:.1f}"),
        ("latency, median and 95% (ms)", "", f"{times['p50']:.0f}, {times['p95']:.0f}"),
        ("memory after the first round, the last (MB)", "",
         ", ".join(f"{value:.0f}" for value in held.values())),
    ]  # fmt: skip
    by_cpu = cpu["caption"] / (cpu["serve"] + cpu["clients"])
    each = ", ".join(f"{ratio:.2f}" for ratio in result["ratios"])
    return "\n".join(
        [
            f"{result['model']} ({machine['cpu']}, {machine['threads']} threads; {versions})",
            f"{result['photos']} photos, one of medium size {photo['width']} x {photo['height']} "
            f"pixels and {photo['kilobytes']} KB; {result['requests']} requests a round, "
            f"{result['bad_requests']} of them with bad files, which capexport caption gets, too; "
            f"{result['clients']} clients on the same machine, {result['rounds']} rounds in turn; "
            f"load average {load['before']:.1f} before, {load['after']:.1f} after",
            "",
            table(rows),
            "",
            f"capexport serve reaches {result['ratio']:.2f} of capexport caption ({each}), and "
            f"{by_cpu:.2f} by CPU time, the clients' counted, which other processes' load disturbs "
            f"less. Of {result['answered']} answers {result['wrong']} were wrong, "
            f"{result['lost']} lost.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
