"""What several commands share: types of arguments, `--json`, and printing. It imports nothing heavy."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from hf_flash.base import dtypes
from hf_flash.base.sizes import parse_bytes
from hf_flash.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import RenderableType

WIKITEXT: Final = "Salesforce/wikitext:wikitext-2-raw-v1"
DTYPES: Final = ("auto", *dtypes.DTYPES)

# --- tables or JSON ----------------------------------------------------------------------------------------------------


def add_json(parser: argparse.ArgumentParser) -> None:
    """`--json`, which means the same in every command that has it."""
    parser.add_argument("--json", type=json_target, nargs="?", const="-", metavar="FILE",
                        help="print all figures as JSON instead of tables; with FILE, write them there, too")  # fmt: skip


def json_target(text: str) -> str:
    """A file that can be written, or `-`; for argparse."""
    if text == "-":
        return text
    try:
        return str(file_target(text))
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}; to print the JSON, put --json last, or write --json=-") from error


def file_target(text: str) -> Path:
    """A file that can be written, for argparse, so that a wrong name is an error now and not after hours of work."""
    path = Path(text)
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a folder, or in none that exists")
    return path


def say(what: RenderableType = "") -> None:
    """Print for people to stdout, at once, because the next step may take hours. Text is wrapped between words."""
    from hf_flash.base.tables import Paragraph, printing

    if sys.stdout is not None:  # it is closed otherwise
        printing().print(Paragraph(what) if isinstance(what, str) else what, crop=False)
        sys.stdout.flush()


def tell(args: argparse.Namespace, what: RenderableType) -> None:
    """Print for people, unless stdout is reserved for JSON."""
    if args.json != "-":
        say(what)


def finish(args: argparse.Namespace, report: Mapping[str, Any]) -> None:
    """Write what `--json` asks for."""
    if args.json == "-":
        print(json.dumps(report, indent=2), flush=True)  # noqa: T201
    elif args.json:
        write_target(Path(args.json), json.dumps(report, indent=2, sort_keys=True) + "\n")


def write_target(path: Path, text: str) -> None:
    """Write a file that the command line names, whole or not at all; a device or a pipe is written to, and not replaced."""
    from hf_flash.base.files import write_text

    is_stream = path.exists() and not path.is_file()
    if is_stream or path.absolute().parts[1:2] in (("dev",), ("proc",)):
        path.write_text(text, encoding="utf-8")
    else:
        write_text(path, text)


def forgiving(*streams: Any) -> None:
    """Let streams take every text: they escape what their encoding lacks, such as names of files in other languages."""
    for stream in streams:
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def quiet_pipe(stream: Any) -> None:
    """Let a stream whose reader is gone lead nowhere, so that Python does not fail again when it flushes it at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


# --- types of arguments ------------------------------------------------------------------------------------------------


def positive(text: str) -> int:
    """A whole number from 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {number}")
    return number


def at_least_two(text: str) -> int:
    """A number of tokens to measure."""
    number = positive(text)
    if number < 2:
        raise argparse.ArgumentTypeError("must be at least 2: the first token is the prompt's")
    return number


def port(text: str) -> int:
    """A port of TCP; 0 is any that is free."""
    number = int(text)
    if not 0 <= number < 1 << 16:
        raise argparse.ArgumentTypeError(f"must be from 0 to 65535, not {number}")
    return number


def seconds(text: str) -> float:
    """A time from 0."""
    number = float(text)
    if not 0 <= number < 1e6:
        raise argparse.ArgumentTypeError(f"must be seconds, from 0 on, not {text}")
    return number


def argument_type(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """`parse` as a type for argparse: a `ConfigError` becomes wrong usage."""

    def parsed(text: str) -> Any:
        try:
            return parse(text)
        except ConfigError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return parsed


def size(text: str) -> int:
    """Bytes."""
    try:
        return parse_bytes(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(f'must be a number of bytes or text such as "6GiB", not {text!r}') from error
