"""`hf-flash`: the commands. Each is a thin layer over a public function.

Exit codes, of all of them:

    0    done
    1    an error of hf_flash or of the Hub, its message on stderr; or what was to be checked is not so (`inspect --check`,
         `bench --check`, `demo`, `doctor`)
    2    wrong usage
    130  interrupted: nothing is half written, and what was finished is kept
    141  what reads the output went away, as `| head` does

Long work shows its progress on stderr. `--json FILE` writes all figures, `--json -` prints them: stdout then has nothing else.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import httpx, tqdm
from rich.console import Console

from hf_flash._version import __version__
from hf_flash.base.files import write_text
from hf_flash.bench import run as bench
from hf_flash.bench.page import page
from hf_flash.bench.plots import check_installed, plot, plot_bench
from hf_flash.bench.report import describe as describe_bench
from hf_flash.calibration import job as calibration
from hf_flash.commands import inspect as inspection
from hf_flash.commands.arguments import (
    Commands,
    add_json,
    at_least_two,
    checked,
    file_target,
    finish,
    forgiving,
    positive,
    quiet_pipe,
    say,
    seconds,
    size,
    tell,
)
from hf_flash.commands.demo import demo
from hf_flash.commands.doctor import diagnose
from hf_flash.config import ARGUMENTS, configure
from hf_flash.errors import ConfigError, HfFlashError
from hf_flash.evaluation import compare as evaluation
from hf_flash.hub.saving import push
from hf_flash.packing import flash_cache
from hf_flash.packing.repacking import repack, restore
from hf_flash.planning import pairing, planner
from hf_flash.store.layout import FlashStore

_TRAIN_TEXT = "Salesforce/wikitext:wikitext-2-raw-v1:train"
_TEST_TEXT = "Salesforce/wikitext:wikitext-2-raw-v1:test"
_TASKS = "arc_easy,arc_challenge,hellaswag"


_EPILOG = """\
the usual path:
  hf-flash doctor                                                 is this machine fit for it?
  hf-flash plan facebook/opt-6.7b --memory 6GiB                   how fast will it be here? before anything is downloaded
  hf-flash repack facebook/opt-6.7b opt-6.7b-flash                once: its FFN bundled, as flash likes to be read
  hf-flash calibrate opt-6.7b-flash --text my.txt                 if you like: better predictors, fewer reads
  hf-flash bench opt-6.7b-flash                                   how fast is it?

and in Python, where transformers' own code stays as it is:
  import hf_flash
  pipe = transformers.pipeline("text-generation", model="opt-6.7b-flash")

exit codes: 0 done; 1 an error, or a check that failed; 2 wrong usage; 130 interrupted, nothing is half written.
hf-flash COMMAND --help explains a command, with an example."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console command. Returns the exit code."""
    forgiving(sys.stdout, sys.stderr)
    try:
        args = _parser().parse_args(argv)
        code: int = args.run(args)
        if sys.stdout is not None:  # it is closed otherwise
            sys.stdout.flush()
        return code
    except (HfFlashError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        print(f"hf-flash: {error}", file=sys.stderr)  # noqa: T201
        return 1
    except httpx.HTTPError as error:
        print(f"hf-flash: the Hub cannot be reached: {error}", file=sys.stderr)  # noqa: T201
        return 1
    except BrokenPipeError:
        quiet_pipe(sys.stdout)
        return 141
    except OSError as error:  # of the system: a current folder that was removed, a full disk behind stdout
        print(f"hf-flash: {error}", file=sys.stderr)  # noqa: T201
        quiet_pipe(sys.stdout)
        return 1
    except UnicodeEncodeError as error:
        advice = "set LANG=C.UTF-8 or PYTHONUTF8=1, or rename what is not valid UTF-8"
        print(f"hf-flash: a name is no text here: {error}\n  to do: {advice}", file=sys.stderr)  # noqa: T201
        return 1
    except KeyboardInterrupt:
        print("hf-flash: interrupted; what was finished is kept, run it again to go on", file=sys.stderr)  # noqa: T201
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hf-flash", usage="hf-flash COMMAND ...", formatter_class=argparse.RawDescriptionHelpFormatter, epilog=_EPILOG,
        description="Run language models larger than memory: their FFN weights stay on flash, and what a token needs is read.",
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"hf-flash {__version__}")
    commands = Commands(parser)
    command = commands.add

    commands.group("see it")
    sub = command("demo", _demo, "Repack a small model, generate with its FFN on flash, compare with the stock model.",
                  "hf-flash demo examples/tiny-opt", "hf-flash demo examples/tiny-opt --watch   # token by token")  # fmt: skip
    sub.add_argument("model", help="folder or Hub repository of a plain OPT checkpoint")
    sub.add_argument("--prompt", default="In the beginning God created", help="text to continue")
    sub.add_argument("--max-new-tokens", type=positive, default=48, metavar="N", help="tokens to generate (default 48)")
    sub.add_argument("--memory-budget", type=size, metavar="SIZE", help='weights in DRAM at most, such as "6GiB"')
    sub.add_argument("--watch", action="store_true", help="show what every token reads and reuses, layer by layer")
    sub.add_argument("--pace", type=seconds, default=0.25, metavar="SECONDS", help="a token is shown so long (default 0.25)")
    add_json(sub)

    sub = command("doctor", _doctor, "Look at this machine: is it fit for hf_flash, and what would make it fitter?",
                  "hf-flash doctor", "hf-flash doctor opt-6.7b-flash     # the model too, and its disk")  # fmt: skip
    sub.add_argument("folder", nargs="?", help="a model, or any folder whose disk to measure (default: the flash cache)")
    add_json(sub)

    commands.group("make a model, keep it, share it")
    sub = command("repack", _repack, "Write a checkpoint again with its FFN bundled for flash.",
                  "hf-flash repack facebook/opt-6.7b opt-6.7b-flash")  # fmt: skip
    sub.add_argument("source", help="folder or Hub repository of a plain checkpoint")
    sub.add_argument("target", help="folder to make")
    sub.add_argument("--predictor", choices=["quantized", "none"], help="default: quantized for ReLU models")
    sub.add_argument("--predictor-bits", type=int, choices=[4, 8], help="width of the quantized predictor (default 4)")
    sub.add_argument("--predictor-group-size", type=int, metavar="N", help="weights that share a scale (default 64)")
    sub.add_argument("--revision", help="branch, tag or commit on the Hub")
    sub.add_argument("--subfolder", default="", help="of the repository or folder, where the checkpoint is")
    sub.add_argument("--local-files-only", action="store_true", help="do not contact the Hub")
    sub.add_argument("--delete-source", action="store_true",
                     help="remove the source's weights from the Hub's cache, once compared with what was written")  # fmt: skip
    add_json(sub)

    sub = command("inspect", _inspect, "Show what is in a repacked checkpoint.", "hf-flash inspect opt-6.7b-flash --check")
    sub.add_argument("folder", help="a repacked checkpoint, or an entry of the flash cache")
    sub.add_argument("--check", action="store_true", help="read everything and compare checksums")
    add_json(sub)

    sub = command("push", _push, "Upload a repacked checkpoint to the Hub, its files as they are.",
                  "hf-flash push opt-6.7b-flash me/opt-6.7b-flash --private")  # fmt: skip
    sub.add_argument("folder", help="a repacked checkpoint")
    sub.add_argument("repo_id", help="me/opt-6.7b-flash")
    sub.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    sub.add_argument("--revision", help="branch to upload to")
    sub.add_argument("--create-pr", action="store_true", help="open a pull request instead")
    sub.add_argument("--commit-message", metavar="TEXT", help="of the commit")
    sub.add_argument("--bench", metavar="FILE", help="JSON report of `hf-flash bench` on this model, for the model card")

    sub = command("cache", _cache, "Show what plain checkpoints were repacked into, or remove it.",
                  "hf-flash cache ls", "hf-flash cache rm facebook/opt-6.7b")  # fmt: skip
    flash_cache.add_arguments(sub)

    sub = command("restore", _restore, "Undo repack: the plain checkpoint, every tensor bit for bit.",
                  "hf-flash restore opt-6.7b-flash opt-6.7b")  # fmt: skip
    sub.add_argument("folder", help="a repacked checkpoint")
    sub.add_argument("target", help="folder to make")

    commands.group("make it read less, and see whether it still answers well")
    sub = command(
        "calibrate", _calibrate, "Train predictors on text and measure what the neurons do; goes on if interrupted.",
        "hf-flash calibrate opt-6.7b-flash --text my.txt --memory-budget 6GiB",
        f"hf-flash calibrate opt-6.7b-flash --text {_TRAIN_TEXT}     # a dataset of the Hub",
    )  # fmt: skip
    calibration.add_arguments(sub)
    add_json(sub)

    sub = command("eval", _eval, "Compare predictors with the dense model, on text and on tasks.",
                  "hf-flash eval opt-6.7b-flash --text other.txt --tasks arc_easy,hellaswag --json figures.json")  # fmt: skip
    sub.add_argument("folder", help="a repacked checkpoint, with its tokenizer")
    sub.add_argument("--stock", metavar="MODEL", help="plain checkpoint to run the tasks with, too; needs the memory for it")
    _evaluation_arguments(sub)

    sub = command("verify", _verify, "Repack, calibrate and evaluate a model: does sparsity keep its answers?",
                  "hf-flash verify facebook/opt-6.7b")  # fmt: skip
    sub.add_argument("model", help="folder or Hub repository of a plain checkpoint")
    sub.add_argument("folder", nargs="?", help="where to repack it to, or where it was (default: MODEL-flash here)")
    sub.add_argument("--calibration-text", default=_TRAIN_TEXT, metavar="TEXT", help=f"to train on (default {_TRAIN_TEXT})")
    sub.add_argument("--samples", type=positive, default=256, metavar="N", help="windows to train on (default 256)")
    sub.add_argument("--with-stock", action="store_true", help="run the tasks on the stock model too; needs the memory for it")
    _evaluation_arguments(sub, text=_TEST_TEXT, tasks=_TASKS)

    commands.group("how fast is it")
    sub = command("plan", _plan, "Predict how fast a model will be on this machine, and how much memory it should have.",
                  "hf-flash plan facebook/opt-6.7b --memory 6GiB     # config.json is all it downloads")  # fmt: skip
    _plan_arguments(sub)

    sub = command(
        "bench", _bench, "Compare decode speed with stock transformers and accelerate, under one memory cap.",
        "hf-flash bench --preset tiny                                      # seconds: shows how it works",
        "hf-flash bench opt-6.7b-flash --plain opt-6.7b --html bench.html",
        "hf-flash bench opt-6.7b-flash --sweep 40,50,60,70,80",
    )  # fmt: skip
    sub.add_argument("model", nargs="?", help="a repacked checkpoint")
    _bench_arguments(sub)

    commands.group("talk to it")
    sub = command("serve", _serve, "Serve a model to OpenAI clients and `transformers chat`, with transformers' own server.",
                  "hf-flash serve opt-6.7b-flash --memory-budget 6GiB --port 8000")  # fmt: skip
    sub.add_argument("model", help="folder or Hub repository, repacked or plain; name@revision for another revision")
    _serve_arguments(sub)
    return parser


def _evaluation_arguments(sub: argparse.ArgumentParser, text: str | None = None, tasks: str = "") -> None:
    def default(value: str) -> str:
        return f" (default {value})" if value else ""

    about = "a UTF-8 file, or a dataset as name[:config[:split]]" + default(text or "")
    sub.add_argument("--text", required=text is None, default=text, help=about)
    sub.add_argument("--tokens", type=positive, default=40_960, metavar="N", help="of the text (default 40960)")
    sub.add_argument("--context", type=positive, metavar="N", help="tokens in a window (default 256)")
    sub.add_argument("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto", help="of compute")
    sub.add_argument("--memory-budget", type=size, metavar="SIZE", help='weights in DRAM at most, such as "6GiB"')
    sub.add_argument("--tasks", default=tasks, metavar="A,B", help="lm-evaluation-harness tasks to run" + default(tasks))
    sub.add_argument("--include-path", metavar="DIR", help="a folder with further tasks")
    sub.add_argument("--limit", type=positive, metavar="N", help="questions per task")
    add_json(sub)
    sub.add_argument("--plots", type=Path, metavar="DIR", help="draw them there")


def _plan_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("model", help="folder or Hub repository, repacked or plain; config.json is enough")
    sub.add_argument("--memory", metavar="SIZE", help='weights in DRAM: a size, or a share of the model such as "50%%"')
    sub.add_argument("--predictor", choices=["quantized", "lowrank", "none"], help="default: the stored one, else quantized")
    sub.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="of compute (default: the checkpoint's)")
    sub.add_argument("--disk", type=Path, metavar="FOLDER", help="whose disk to measure (default: the model's or the cache's)")
    sub.add_argument("--active", type=float, metavar="X", help="share of the neurons that are active (default: as calibrated)")
    sub.add_argument("--fresh", type=float, metavar="X", help="of these, not used in 4 tokens (default: as calibrated)")
    sub.add_argument(
        "--predicted", type=float, metavar="X", help="neurons predicted for an active one (default: as calibrated)"
    )
    sub.add_argument("--tokens", type=positive, metavar="N", help="predict the mean of so many (default: in the long run)")
    sub.add_argument("--prompt-tokens", type=positive, metavar="N", default=16, help="before these (default 16)")
    sub.add_argument("--reader", choices=["auto", "mmap", "direct"], default="auto", help="as loading would choose (default)")
    sub.add_argument("--assistant", metavar="MODEL", help="a model that drafts for it: divide --memory between the two")
    sub.add_argument("--draft-tokens", type=positive, metavar="N", default=pairing.DRAFT_TOKENS,
                     help="that it proposes at a time (default 4)")  # fmt: skip
    sub.add_argument("--revision", help="branch, tag or commit on the Hub")
    add_json(sub)


def _bench_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--plain", type=Path, metavar="FOLDER", help="the same model as a plain checkpoint, for the others")
    sub.add_argument("--preset", choices=["tiny"], help="a random model made for the purpose, in seconds, instead of MODEL")
    names = ", ".join([*bench.SYSTEMS, *bench.GROUPS])
    sub.add_argument("--systems", metavar="A,B", help=f"what to compare, of: {names.replace('%', '%%')}")
    sub.add_argument("--system", action="append", default=[], type=checked(bench.parse_system), metavar='"NAME: ARG=VALUE"',
                     help="a further row of hf_flash with arguments of FlashOffloadConfig; may be repeated")  # fmt: skip
    sub.add_argument("--flash-arg", action="append", default=[], type=checked(bench.parse_arguments), metavar="ARG=VALUE",
                     help="an argument of FlashOffloadConfig for all rows of hf_flash; may be repeated")  # fmt: skip
    sub.add_argument("--sweep", default=[], type=checked(bench.parse_sweep), metavar="40,50,60:quantized",
                     help="hf_flash at each of these budgets: percent or sizes, and which predictor")  # fmt: skip
    sub.add_argument("--tokens", type=at_least_two, metavar="N", help="to generate; slow systems stop at 8 (default 64)")
    sub.add_argument("--prompt-tokens", type=positive, metavar="N", help="of each random prompt (default 16)")
    sub.add_argument("--batch-size", type=positive, metavar="N", help="sequences at once (default 1)")
    sub.add_argument("--memory", metavar="SIZE", help='weights in DRAM: a size, or a share of the model (default "50%%")')
    sub.add_argument("--headroom", type=size, metavar="SIZE", help='what the cap allows beyond it (default "0.6GB")')
    sub.add_argument("--repeats", type=positive, metavar="N", help="rounds; a row shows its median one (default 1)")
    sub.add_argument("--timeout", type=positive, metavar="SECONDS", help="for each system (default 1800)")
    sub.add_argument("--cap", action=argparse.BooleanOptionalAction, default=True, help="whether to cap memory (default yes)")
    sub.add_argument("--check", action="store_true", help="fail if flash generates other tokens than without a cap")
    sub.add_argument("--note", action="append", default=[], metavar="TEXT", help="a line for the report; may be repeated")
    add_json(sub)
    sub.add_argument("--plot", type=Path, metavar="FILE.svg", help="draw where the time of a token goes, and over budgets")
    sub.add_argument("--html", type=file_target, metavar="FILE", help="write a page with all figures and drawings")


def _serve_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--host", default="localhost", help="address to listen on (default localhost)")
    sub.add_argument("--port", type=int, default=8000, help="port to listen on; 0 takes a free one (default 8000)")
    sub.add_argument("--chat-template", type=Path, metavar="FILE", help="Jinja template for a model without one")
    sub.add_argument("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto", help="of compute")
    sub.add_argument("--attn-implementation", choices=["eager", "sdpa"], help="default: transformers' choice")
    sub.add_argument("--continuous-batching", action="store_true", help="decode requests together, sampled as the first says")
    sub.add_argument("--kv-cache", type=size, default="1GiB", metavar="SIZE", help="for continuous batching (default 1GiB)")
    sub.add_argument("--enable-cors", action="store_true", help="let web pages from anywhere call it")
    sub.add_argument("--log-level", choices=["error", "warning", "info", "debug"], default="info", help="default info")
    flash = sub.add_argument_group("flash", "arguments of FlashOffloadConfig; what is left out is as the model stores it")
    flash.add_argument("--memory-budget", metavar="SIZE", help='weights in DRAM at most, such as "6GiB"')
    flash.add_argument("--predictor", choices=["quantized", "lowrank", "none"], help="who names the neurons of a token")
    flash.add_argument("--predictor-bits", type=int, choices=[4, 8], help="of the quantized one, for a plain checkpoint")
    flash.add_argument("--predictor-group-size", type=int, metavar="N", help="weights that share a scale, likewise")
    flash.add_argument("--predictor-margin", type=float, metavar="X", help="standard deviations of its rounding error")
    flash.add_argument("--window", type=int, metavar="N", help="tokens a neuron stays in DRAM for")
    flash.add_argument("--lookahead", type=int, choices=[0, 1], help="start reading before a layer's attention")
    flash.add_argument("--reader", choices=["auto", "mmap", "direct"], help="through the page cache or past it")
    flash.add_argument("--io-threads", type=int, metavar="N", help="parallel direct reads without io_uring")
    flash.add_argument("--cache-dir", metavar="DIR", help="where plain checkpoints are repacked to")


# --- what they do ------------------------------------------------------------------------------------------------------


def _demo(args: argparse.Namespace) -> int:
    report = demo(
        args.model, args.prompt, args.max_new_tokens, memory_budget=args.memory_budget, watch=args.watch,
        pace=args.pace, tell=lambda text: tell(args, text), console=Console(stderr=args.json == "-"),
    )  # fmt: skip
    finish(args, report)
    return 0 if report["same_tokens"]["none"] else 1


def _doctor(args: argparse.Namespace) -> int:
    found = diagnose(args.folder)
    if args.json != "-":
        Console(highlight=False).print(found.describe(), soft_wrap=True)
    finish(args, found.to_dict())
    return 0 if found.works else 1


def _repack(args: argparse.Namespace) -> int:
    target = repack(
        args.source, args.target, predictor=args.predictor, predictor_bits=args.predictor_bits,
        predictor_group_size=args.predictor_group_size, revision=args.revision, local_files_only=args.local_files_only,
        subfolder=args.subfolder, delete_source=args.delete_source,
    )  # fmt: skip
    found = inspection.facts(FlashStore.open_folder(target))
    tell(args, inspection.describe(found))
    if args.delete_source:
        tell(args, "\nthe source's weights were found again in it, bit for bit, and removed from the Hub's cache")
    tell(args, f"\nload it:  import hf_flash; pipeline('text-generation', model={str(target)!r})")
    finish(args, found)
    return 0


def _inspect(args: argparse.Namespace) -> int:
    store = FlashStore.open_folder(args.folder)
    found, problems = inspection.facts(store), list[str]()
    tell(args, inspection.describe(found))
    if args.check:
        problems = store.check(lambda layers: tqdm(layers, desc="Checking", unit="layer", delay=1))
        tell(args, "\n".join(problems) if problems else "checksums         all right")
    finish(args, found | {"checked": args.check, "problems": problems})
    return 1 if problems else 0


def _push(args: argparse.Namespace) -> int:
    info = push(
        args.folder, args.repo_id, private=args.private, revision=args.revision, create_pr=args.create_pr,
        commit_message=args.commit_message, bench=args.bench,
    )  # fmt: skip
    say(info)
    return 0


def _cache(args: argparse.Namespace) -> int:
    return flash_cache.run(args)


def _restore(args: argparse.Namespace) -> int:
    say(restore(args.folder, args.target))
    return 0


def _calibrate(args: argparse.Namespace) -> int:
    report = calibration.run(args)
    tell(args, calibration.describe(report))
    finish(args, report)
    return 0


def _eval(args: argparse.Namespace) -> int:
    if args.plots:
        check_installed()
    report = evaluation.evaluate(
        args.folder, args.text, tokens=args.tokens, context=args.context, memory_budget=args.memory_budget, dtype=args.dtype,
    )  # fmt: skip
    tell(args, evaluation.describe(report))
    tasks = [task for task in args.tasks.split(",") if task]
    if tasks:
        report["tasks"] = evaluation.evaluate_tasks(
            args.folder, tasks, stock=args.stock, limit=args.limit, include_path=args.include_path, dtype=args.dtype,
            memory_budget=args.memory_budget,
        )  # fmt: skip
        tell(args, "\n" + evaluation.describe_tasks(report["tasks"]))
    finish(args, report)
    if args.plots:
        tell(args, "\n".join(map(str, plot(report, args.plots))))
    return 0


def _verify(args: argparse.Namespace) -> int:
    folder = Path(args.folder or f"{Path(args.model).name}-flash")
    if not folder.exists():
        repack(args.model, folder)
    if FlashStore.open_folder(folder).calibration is None:
        found = calibration.calibrate(
            folder, args.calibration_text, samples=args.samples, memory_budget=args.memory_budget, context=args.context,
        )  # fmt: skip
        tell(args, calibration.describe(found) + "\n")
    args.folder, args.stock = folder, args.model if args.with_stock else None
    return _eval(args)


def _plan(args: argparse.Namespace) -> int:
    options = {name: getattr(args, name) for name in (
        "memory", "predictor", "dtype", "disk", "active", "fresh", "predicted", "tokens", "prompt_tokens", "reader", "revision",
    )}  # fmt: skip
    found: planner.Plan | pairing.Pair
    if args.assistant:
        found = pairing.plan_pair(args.model, args.assistant, draft_tokens=args.draft_tokens, **options)
    else:
        found = planner.plan(args.model, **options)
    tell(args, found.describe())
    finish(args, found.to_dict())
    return 0


def _bench(args: argparse.Namespace) -> int:
    if (args.model is None) == (args.preset is None) or (args.preset and args.plain):
        raise ConfigError("nothing to measure, or too much", expected="either a repacked MODEL or --preset tiny")
    if args.plot or args.html:
        check_installed()
    given = "tokens", "prompt_tokens", "batch_size", "memory", "headroom", "repeats", "timeout"
    settings = {name: value for name in given if (value := getattr(args, name)) is not None}
    settings |= {"cap": args.cap, "check": args.check, "notes": args.note}
    settings["arguments"] = {k: v for item in args.flash_arg for k, v in item.items()}
    names = args.systems and [name.strip() for name in args.systems.split(",") if name.strip()]
    usual = [] if args.sweep else bench.TINY if args.preset else bench.default_systems(args.plain)
    settings["systems"] = [*(names or usual), *args.system, *args.sweep]
    report = bench.bench_tiny(**settings) if args.preset else bench.bench(args.model, plain=args.plain, **settings)
    tell(args, describe_bench(report))
    finish(args, report)
    if args.plot:
        plot_bench(report, args.plot)
    if args.html:
        write_text(args.html, page(report))
    return 0 if report.get("same_tokens", True) else 1


def _serve(args: argparse.Namespace) -> int:
    try:
        from hf_flash.serving.server import Server
    except ImportError as error:
        raise ConfigError("serving needs more packages", got=error, hint="pip install 'hf-flash[serve]'") from error
    configure(**{name: getattr(args, name) for name in ARGUMENTS})
    server = Server(
        args.model, host=args.host, port=args.port, dtype=args.dtype, attn_implementation=args.attn_implementation,
        chat_template=args.chat_template, kv_cache_bytes=args.kv_cache if args.continuous_batching else None,
        enable_cors=args.enable_cors, log_level=args.log_level,
    )  # fmt: skip
    say(server.describe())
    server.run()
    return 0
