"""What all commands of `hf-flash` share: help in groups with examples, argument types, tables or JSON."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hf_flash.base.files import write_json
from hf_flash.base.sizes import parse_bytes
from hf_flash.errors import ConfigError

Run = Callable[[argparse.Namespace], int]


class Commands:
    """The subcommands of a parser, listed in its help by group."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self._parser = parser
        self._about = parser.description or ""
        self._made = parser.add_subparsers(prog=parser.prog, metavar="COMMAND", required=True, help=argparse.SUPPRESS)
        self._groups: list[tuple[str, list[tuple[str, str]]]] = []

    def group(self, title: str) -> None:
        """What is added from now on is listed under this title."""
        self._groups.append((title, []))

    def add(self, name: str, run: Run, about: str, *examples: str) -> argparse.ArgumentParser:
        """A command.

        Args:
            name: what users type.
            run: does it; returns the exit code.
            about: a sentence.
            examples: command lines, each with a comment if it needs one.
        """
        title = "example" if len(examples) == 1 else "examples"
        sub: argparse.ArgumentParser = self._made.add_parser(
            name, description=about, formatter_class=argparse.RawDescriptionHelpFormatter,
            epilog="\n  ".join([f"{title}:", *examples]) if examples else None,
        )  # fmt: skip
        sub.set_defaults(run=run)
        self._groups[-1][1].append((name, about))
        wide = 2 + max(len(name) for _, commands in self._groups for name, _ in commands)
        listing = [
            "\n".join([f"{title}:", *(f"  {name:<{wide}}{about}" for name, about in commands)])
            for title, commands in self._groups
        ]
        self._parser.description = "\n\n".join([self._about, *listing])
        return sub


# --- tables or JSON ----------------------------------------------------------------------------------------------------


def add_json(parser: argparse.ArgumentParser) -> None:
    """`--json`, which means the same in every command that has it."""
    parser.add_argument("--json", type=json_target, metavar="FILE",
                        help="write all figures there, or - to print them instead of tables")  # fmt: skip


def json_target(text: str) -> str:
    """A file that can be written, or `-`; for argparse."""
    return text if text == "-" else str(file_target(text))


def file_target(text: str) -> Path:
    """A file that can be written, for argparse: what is wrong is found now, not after hours."""
    path = Path(text)
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a folder, or in none that exists")
    return path


def say(text: object = "") -> None:
    """Print to stdout, at once: what comes next may take hours."""
    print(text, flush=True)  # noqa: T201


def tell(args: argparse.Namespace, text: object) -> None:
    """Print for people, unless stdout is for JSON."""
    if args.json != "-":
        say(text)


def finish(args: argparse.Namespace, report: Mapping[str, Any]) -> None:
    """Write what `--json` asks for."""
    if args.json == "-":
        say(json.dumps(report, indent=2))
    elif args.json:
        write_json(Path(args.json), report)


def forgiving(*streams: Any) -> None:
    """Let streams take every text: what their encoding has not, as names of files in other languages, is escaped."""
    for stream in streams:
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def quiet_pipe(stream: Any) -> None:
    """After its reader went away: nothing more is tried to be written to it, at exit neither."""
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


def seconds(text: str) -> float:
    """A time from 0."""
    number = float(text)
    if not 0 <= number < 1e6:
        raise argparse.ArgumentTypeError(f"must be seconds, from 0 on, not {text}")
    return number


def checked(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """For argparse, whose errors are wrong usage."""

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
