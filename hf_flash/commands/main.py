"""`hf-flash`: its entry point, the table of commands, and the exit codes. Each command is a thin layer over a public function.

Exit codes of all commands:

    0    done
    1    an error of hf_flash or of the Hub, with its message on stderr; or a check that failed (`inspect --check`,
         `bench --check`, `demo`, `doctor`)
    2    wrong usage
    130  interrupted: nothing is half written, and finished work is kept
    141  the reader of the output went away, as `| head` does

Long work shows its progress on stderr. `--json FILE` writes all figures; `--json -` prints them, and nothing else, to stdout.

To add a command, write a module `run_NAME.py` with `add_arguments` and `run`, and add a line to `COMMANDS`. Help and wrong
usage must answer at once, so neither this module nor those of the table import anything heavy.
"""

from __future__ import annotations

import argparse
import atexit
import os
import signal
import sys
from collections.abc import Sequence
from typing import Final, NamedTuple, Protocol

from hf_flash._version import __version__
from hf_flash.commands import (
    run_bench,
    run_cache,
    run_calibrate,
    run_demo,
    run_doctor,
    run_eval,
    run_inspect,
    run_plan,
    run_push,
    run_repack,
    run_restore,
    run_serve,
    run_verify,
)
from hf_flash.commands.arguments import WIKITEXT, forgiving, quiet_pipe
from hf_flash.commands.interrupts import INTERRUPTED, end_at_once, interrupted_outside_imports
from hf_flash.errors import HfFlashError


class CommandModule(Protocol):
    """What the module of a command has."""

    def add_arguments(self, parser: argparse.ArgumentParser, /) -> None:
        """Add the arguments of the command to its parser."""

    def run(self, args: argparse.Namespace, /) -> int:
        """Do it. Returns the exit code."""


class Command(NamedTuple):
    """A command: the name that users type, its module, a sentence about it, and command lines that show how to use it."""

    name: str
    module: CommandModule
    about: str
    examples: tuple[str, ...]


COMMANDS: Final = {
    "see it": (
        Command(
            "demo", run_demo, "Let small models generate with their weights on flash, and compare them with the stock ones.",
            ("hf-flash demo                              # three small models of the repository",
             "hf-flash demo examples/tiny-opt --watch    # token by token"),
        ),
        Command(
            "doctor", run_doctor, "Look at this machine: is it fit for hf_flash, and what would make it fitter?",
            ("hf-flash doctor", "hf-flash doctor opt-6.7b-flash     # the model too, and its disk"),
        ),
    ),
    "make a model, keep it, share it": (
        Command(
            "repack", run_repack, "Write a checkpoint again with its FFN bundled for flash.",
            ("hf-flash repack facebook/opt-6.7b opt-6.7b-flash",),
        ),
        Command(
            "inspect", run_inspect, "Show what is in a repacked checkpoint or a mixture of experts.",
            ("hf-flash inspect opt-6.7b-flash --check",),
        ),
        Command(
            "push", run_push, "Upload a saved model to the Hub, its files as they are.",
            ("hf-flash push opt-6.7b-flash me/opt-6.7b-flash --private",),
        ),
        Command(
            "cache", run_cache, "Show what plain checkpoints were repacked into, or remove it.",
            ("hf-flash cache ls", "hf-flash cache rm facebook/opt-6.7b"),
        ),
        Command(
            "restore", run_restore, "Undo repack: the plain checkpoint, every tensor bit for bit.",
            ("hf-flash restore opt-6.7b-flash opt-6.7b",),
        ),
    ),
    "make it read less, and see whether it still answers well": (
        Command(
            "calibrate", run_calibrate, "Train predictors on text, measure neurons or routers; goes on if interrupted.",
            ("hf-flash calibrate opt-6.7b-flash --text my.txt --memory-budget 6GiB",
             f"hf-flash calibrate opt-6.7b-flash --text {WIKITEXT}:train     # a dataset of the Hub"),
        ),
        Command(
            "eval", run_eval, "Compare predictors with the dense model, on text and on tasks.",
            ("hf-flash eval opt-6.7b-flash --text other.txt --tasks arc_easy,hellaswag --json figures.json",),
        ),
        Command(
            "verify", run_verify, "Repack, calibrate and evaluate a model: does sparsity keep its answers?",
            ("hf-flash verify facebook/opt-6.7b",),
        ),
    ),
    "how fast is it": (
        Command(
            "plan", run_plan, "Predict how fast a model will be on this machine, and how much memory it should have.",
            ("hf-flash plan facebook/opt-6.7b --memory 6GiB     # config.json is all it downloads",),
        ),
        Command(
            "bench", run_bench, "Compare decode speed with stock transformers and accelerate, under one memory cap.",
            ("hf-flash bench --preset tiny                                      # seconds: shows how it works",
             "hf-flash bench opt-6.7b-flash --plain opt-6.7b --html bench.html",
             "hf-flash bench opt-6.7b-flash --sweep 40,50,60,70,80"),
        ),
    ),
    "talk to it": (
        Command(
            "serve", run_serve, "Serve a model to OpenAI clients and `transformers chat`, with transformers' own server.",
            ("hf-flash serve opt-6.7b-flash --memory-budget 6GiB --port 8000",),
        ),
    ),
}  # fmt: skip
"""All commands, in the groups of the help text."""

_ABOUT: Final = "Run language models larger than memory: their FFN weights stay on flash, and what a token needs is read."
_EPILOG: Final = """\
the usual path:
  hf-flash doctor                                                 is this machine fit for it?
  hf-flash plan facebook/opt-6.7b --memory 6GiB                   how fast will it be here? before anything is downloaded
  hf-flash repack facebook/opt-6.7b opt-6.7b-flash                once: its FFN bundled, as flash likes to be read
  hf-flash calibrate opt-6.7b-flash --text my.txt                 if you like: better predictors, fewer reads
  hf-flash bench opt-6.7b-flash                                   how fast is it?

and in Python, where transformers' own code stays as it is:
  import hf_flash
  pipe = transformers.pipeline("text-generation", model="opt-6.7b-flash")

exit codes: 0 done; 1 an error, or a check that failed; 2 wrong usage; 130 interrupted, nothing is half written;
  141 the reader of the output went away.
to complete commands and options with Tab, in bash or zsh:  eval "$(register-python-argcomplete hf-flash)"
hf-flash COMMAND --help explains a command, with an example."""


def program() -> int:
    """Entry point of the console command. Returns the exit code."""
    try:
        return main()
    finally:  # all is done, but to end the interpreter takes half a second, and the end of every thread
        signal.signal(signal.SIGINT, end_at_once)
        atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Returns the exit code.

    Args:
        argv: what follows the program's name. Default: of this process.
    """
    forgiving(sys.stdout, sys.stderr)
    try:
        with interrupted_outside_imports(__name__):
            parser = _parser()
            _complete(parser)
            args = parser.parse_args(argv)
            code: int = args.run(args)
            if sys.stdout is not None:  # it is closed otherwise
                sys.stdout.flush()
            return code
    except HfFlashError as error:
        return _failed(error)
    except BrokenPipeError:
        quiet_pipe(sys.stdout)
        return 141
    except KeyboardInterrupt:
        print("hf-flash: interrupted; what was finished is kept, run it again to go on", file=sys.stderr)  # noqa: T201
        return INTERRUPTED
    except Exception as error:
        if (problem := _problem_of_the_hub(error)) is not None:
            return _failed(problem)
        if isinstance(error, OSError):  # of the system: a current folder that was removed, a full disk behind stdout
            _failed(error)
            quiet_pipe(sys.stdout)
            return 1
        if isinstance(error, UnicodeEncodeError):
            advice = "set LANG=C.UTF-8 or PYTHONUTF8=1, or rename what is not valid UTF-8"
            return _failed(f"a name is no text here: {error}\n  to do: {advice}")
        raise


def _complete(parser: argparse.ArgumentParser) -> None:
    """Answer a shell that wants to complete a command line (argcomplete), and end the process; otherwise do nothing."""
    if "_ARGCOMPLETE" in os.environ:
        import argcomplete

        argcomplete.autocomplete(parser)


def _failed(problem: object) -> int:
    print(f"hf-flash: {problem}", file=sys.stderr)  # noqa: T201
    return 1


def _problem_of_the_hub(error: Exception) -> str | None:
    """The message of an error of the Hub or of its connection, or `None` for every other error."""
    if "huggingface_hub" not in sys.modules:  # then it raised nothing, and need not be imported to know that
        return None
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled
    from huggingface_hub.utils import httpx

    if isinstance(error, HfHubHTTPError | HFValidationError | LocalEntryNotFoundError | OfflineModeIsEnabled):
        return str(error)
    return f"the Hub cannot be reached: {error}" if isinstance(error, httpx.HTTPError) else None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hf-flash", usage="hf-flash COMMAND ...", formatter_class=argparse.RawDescriptionHelpFormatter,
        description=f"{_ABOUT}\n\n{_listing()}", epilog=_EPILOG,
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"hf-flash {__version__}")
    subparsers = parser.add_subparsers(prog=parser.prog, metavar="COMMAND", required=True, help=argparse.SUPPRESS)
    for command in (command for group in COMMANDS.values() for command in group):
        title = "example" if len(command.examples) == 1 else "examples"
        sub = subparsers.add_parser(
            command.name, description=command.about, formatter_class=argparse.RawDescriptionHelpFormatter,
            epilog="\n  ".join([f"{title}:", *command.examples]),
        )  # fmt: skip
        sub.set_defaults(run=command.module.run, wrong_usage=sub.error)
        command.module.add_arguments(sub)
    return parser


def _listing() -> str:
    """The commands by group, for the help text."""
    width = 2 + max(len(command.name) for group in COMMANDS.values() for command in group)
    return "\n\n".join(
        "\n".join([f"{title}:", *(f"  {command.name:<{width}}{command.about}" for command in group)])
        for title, group in COMMANDS.items()
    )
