"""The `capexport` command: a module for each subcommand, its parser beside its run."""

from __future__ import annotations

import argparse

import capexport
from capexport.cli.command import run_command, run_parser, show_progress, teaching

__all__ = ["main", "run_command", "run_parser", "show_progress", "teaching"]


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns its exit code.

    0: done; 1: some images could not be read; 2: refused, with one line that says why;
    130: interrupted; 143: stopped by SIGTERM; 141: nobody reads standard output any more.
    """
    return run_command("capexport", lambda: _run(argv))


def _run(argv: list[str] | None) -> int:
    options = _parser().parse_args(argv)
    show_progress()
    return int(options.run(options))


def _parser() -> argparse.ArgumentParser:
    # Here, where Ctrl-C is answered already: numpy and Pillow take a while.
    from capexport.cli import blip2, caption, graph, inspect, lstm, serve, web

    parser = argparse.ArgumentParser(
        prog="capexport",
        **teaching(
            "Image captioning from training to production: export a PyTorch captioner to ONNX, "
            "then run the export without PyTorch.",
            "capexport caption photo.jpg                      # with the bundled captioner",
            "capexport lstm runs/first --out artifacts/first",
            "capexport caption -m artifacts/first photos/ --out captions.jsonl",
            "capexport COMMAND --help                         # what a command does and takes",
        ),
    )
    parser.add_argument("--version", action="version", version=f"capexport {capexport.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in (lstm, blip2, graph, web, caption, serve, inspect):
        command.add_parser(commands)
    return parser
