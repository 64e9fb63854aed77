"""`hf-flash`: the commands. Each is a thin layer over a public function.

Exit codes: 0 done, 1 an error of hf_flash or of the Hub (its message on stderr), 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import tqdm

from . import bench, calibration, evaluation, planner
from ._version import __version__
from .bench_report import describe as describe_bench
from .budget import format_bytes, parse_bytes
from .config import ARGUMENTS, FlashOffloadConfig, configure
from .errors import ConfigError, HfFlashError
from .plots import plot, plot_bench
from .repack import repack, restore
from .runtime import stats, stored_report
from .saving import push
from .store import ALIGNMENT, FlashStore
from .writer import write_json

_TRAIN_TEXT = "Salesforce/wikitext:wikitext-2-raw-v1:train"
_TEST_TEXT = "Salesforce/wikitext:wikitext-2-raw-v1:test"
_TASKS = "arc_easy,arc_challenge,hellaswag"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console command. Returns the exit code."""
    args = _parser().parse_args(argv)
    try:
        code: int = args.run(args)
        return code
    except HfFlashError as error:
        print(f"hf-flash: {error}", file=sys.stderr)  # noqa: T201
        return 1
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        print(f"hf-flash: {error}", file=sys.stderr)  # noqa: T201
        return 1
    except KeyboardInterrupt:
        print("hf-flash: interrupted; what was finished is kept, run it again to go on", file=sys.stderr)  # noqa: T201
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hf-flash", description="Run language models larger than memory: FFN weights stay on flash.",
        epilog="Start with: hf-flash repack facebook/opt-1.3b opt-1.3b-flash",
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"hf-flash {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, run: Any, about: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=about, description=about)
        sub.set_defaults(run=run)
        return sub

    sub = command("demo", _demo, "Repack a small model, generate with its FFN on flash, compare with the stock model.")
    sub.add_argument("model", help="folder or Hub repository of a plain OPT checkpoint")
    sub.add_argument("--prompt", default="In the beginning God created", help="text to continue")
    sub.add_argument("--max-new-tokens", type=_positive, default=48, metavar="N", help="tokens to generate (default 48)")
    sub.add_argument("--memory-budget", type=_size, metavar="SIZE", help='weights in DRAM at most, such as "6GiB"')

    sub = command("repack", _repack, "Write a checkpoint again with its FFN bundled for flash.")
    sub.add_argument("source", help="folder or Hub repository of a plain checkpoint")
    sub.add_argument("target", help="folder to make")
    sub.add_argument("--predictor", choices=["quantized", "none"], help="default: quantized for ReLU models")
    sub.add_argument("--predictor-bits", type=int, choices=[4, 8], help="width of the quantized predictor (default 4)")
    sub.add_argument("--predictor-group-size", type=int, metavar="N", help="weights that share a scale (default 64)")
    sub.add_argument("--revision", help="branch, tag or commit on the Hub")
    sub.add_argument("--local-files-only", action="store_true", help="do not contact the Hub")

    sub = command("calibrate", _calibrate, "Train predictors on text and measure what the neurons do; goes on if interrupted.")
    calibration.add_arguments(sub)

    sub = command("eval", _eval, "Compare predictors with the dense model, on text and on tasks.")
    sub.add_argument("folder", help="a repacked checkpoint, with its tokenizer")
    sub.add_argument("--stock", metavar="MODEL", help="plain checkpoint to run the tasks with, too; needs the memory for it")
    _evaluation_arguments(sub)

    sub = command("verify", _verify, "Repack, calibrate and evaluate a model: does sparsity keep its answers?")
    sub.add_argument("model", help="folder or Hub repository of a plain checkpoint")
    sub.add_argument("folder", nargs="?", help="where to repack it to, or where it was (default: MODEL-flash here)")
    sub.add_argument("--calibration-text", default=_TRAIN_TEXT, metavar="TEXT", help=f"to train on (default {_TRAIN_TEXT})")
    sub.add_argument("--samples", type=_positive, default=256, metavar="N", help="windows to train on (default 256)")
    sub.add_argument("--with-stock", action="store_true", help="run the tasks on the stock model too; needs the memory for it")
    _evaluation_arguments(sub, text=_TEST_TEXT, tasks=_TASKS)

    sub = command("plan", _plan, "Predict how fast a model will be on this machine, and how much memory it should have.")
    _plan_arguments(sub)

    sub = command("bench", _bench, "Compare decode speed with stock transformers and accelerate, under one memory cap.")
    sub.add_argument("model", nargs="?", help="a repacked checkpoint")
    _bench_arguments(sub)

    sub = command("serve", _serve, "Serve a model to OpenAI clients and `transformers chat`, with transformers' own server.")
    sub.add_argument("model", help="folder or Hub repository, repacked or plain; name@revision for another revision")
    _serve_arguments(sub)

    sub = command("restore", _restore, "Undo repack: the plain checkpoint, every tensor bit for bit.")
    sub.add_argument("folder", help="a repacked checkpoint")
    sub.add_argument("target", help="folder to make")

    sub = command("inspect", _inspect, "Show what is in a repacked checkpoint.")
    sub.add_argument("folder", help="a repacked checkpoint, or an entry of the flash cache")
    sub.add_argument("--check", action="store_true", help="read everything and compare checksums")
    sub.add_argument("--json", action="store_true", help="print JSON")

    sub = command("push", _push, "Upload a repacked checkpoint to the Hub, its files as they are.")
    sub.add_argument("folder", help="a repacked checkpoint")
    sub.add_argument("repo_id", help="me/opt-6.7b-flash")
    sub.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    sub.add_argument("--revision", help="branch to upload to")
    sub.add_argument("--create-pr", action="store_true", help="open a pull request instead")
    sub.add_argument("--commit-message", metavar="TEXT", help="of the commit")
    return parser


def _evaluation_arguments(sub: argparse.ArgumentParser, text: str | None = None, tasks: str = "") -> None:
    def default(value: str) -> str:
        return f" (default {value})" if value else ""

    about = "a UTF-8 file, or a dataset as name[:config[:split]]" + default(text or "")
    sub.add_argument("--text", required=text is None, default=text, help=about)
    sub.add_argument("--tokens", type=_positive, default=40_960, metavar="N", help="of the text (default 40960)")
    sub.add_argument("--context", type=_positive, metavar="N", help="tokens in a window (default 256)")
    sub.add_argument("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto", help="of compute")
    sub.add_argument("--memory-budget", type=_size, metavar="SIZE", help='weights in DRAM at most, such as "6GiB"')
    sub.add_argument("--tasks", default=tasks, metavar="A,B", help="lm-evaluation-harness tasks to run" + default(tasks))
    sub.add_argument("--include-path", metavar="DIR", help="a folder with further tasks")
    sub.add_argument("--limit", type=_positive, metavar="N", help="questions per task")
    sub.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
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
    sub.add_argument("--tokens", type=_positive, metavar="N", help="predict the mean of so many (default: in the long run)")
    sub.add_argument("--prompt-tokens", type=_positive, metavar="N", default=16, help="before these (default 16)")
    sub.add_argument("--revision", help="branch, tag or commit on the Hub")
    sub.add_argument("--json", metavar="FILE", help="write all figures there, or - to print them instead of tables")


def _bench_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--plain", type=Path, metavar="FOLDER", help="the same model as a plain checkpoint, for the others")
    sub.add_argument("--preset", choices=["tiny"], help="a random model made for the purpose, in seconds, instead of MODEL")
    names = ", ".join([*bench.SYSTEMS, *bench.GROUPS])
    sub.add_argument("--systems", metavar="A,B", help=f"what to compare, of: {names.replace('%', '%%')}")
    sub.add_argument("--system", action="append", default=[], type=_checked(bench.parse_system), metavar='"NAME: ARG=VALUE"',
                     help="a further row of hf_flash with arguments of FlashOffloadConfig; may be repeated")  # fmt: skip
    sub.add_argument("--flash-arg", action="append", default=[], type=_checked(bench.parse_arguments), metavar="ARG=VALUE",
                     help="an argument of FlashOffloadConfig for all rows of hf_flash; may be repeated")  # fmt: skip
    sub.add_argument("--sweep", default=[], type=_checked(bench.parse_sweep), metavar="40,50,60:quantized",
                     help="hf_flash at each of these budgets: percent or sizes, and which predictor")  # fmt: skip
    sub.add_argument("--tokens", type=_at_least_two, metavar="N", help="to generate; slow systems stop at 8 (default 64)")
    sub.add_argument("--prompt-tokens", type=_positive, metavar="N", help="of the random prompt (default 16)")
    sub.add_argument("--memory", metavar="SIZE", help='weights in DRAM: a size, or a share of the model (default "50%%")')
    sub.add_argument("--headroom", type=_size, metavar="SIZE", help='what the cap allows beyond it (default "0.6GB")')
    sub.add_argument("--repeats", type=_positive, metavar="N", help="rounds; a row shows its median one (default 1)")
    sub.add_argument("--timeout", type=_positive, metavar="SECONDS", help="for each system (default 1800)")
    sub.add_argument("--cap", action=argparse.BooleanOptionalAction, default=True, help="whether to cap memory (default yes)")
    sub.add_argument("--check", action="store_true", help="fail if flash generates other tokens than without a cap")
    sub.add_argument("--note", action="append", default=[], metavar="TEXT", help="a line for the report; may be repeated")
    sub.add_argument("--json", metavar="FILE", help="write all figures there, or - to print them instead of tables")
    sub.add_argument("--plot", type=Path, metavar="FILE.svg", help="draw where the time of a token goes, and over budgets")


def _serve_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--host", default="localhost", help="address to listen on (default localhost)")
    sub.add_argument("--port", type=int, default=8000, help="port to listen on; 0 takes a free one (default 8000)")
    sub.add_argument("--chat-template", type=Path, metavar="FILE", help="Jinja template for a model without one")
    sub.add_argument("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto", help="of compute")
    sub.add_argument("--attn-implementation", choices=["eager", "sdpa"], help="default: transformers' choice")
    sub.add_argument("--continuous-batching", action="store_true", help="decode requests together, sampled as the first says")
    sub.add_argument("--kv-cache", type=_size, default="1GiB", metavar="SIZE", help="for continuous batching (default 1GiB)")
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


def _at_least_two(text: str) -> int:
    number = _positive(text)
    if number < 2:
        raise argparse.ArgumentTypeError("must be at least 2: the first token is the prompt's")
    return number


def _checked(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """For argparse, whose errors are wrong usage."""

    def parsed(text: str) -> Any:
        try:
            return parse(text)
        except ConfigError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return parsed


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {number}")
    return number


def _size(text: str) -> int:
    try:
        return parse_bytes(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(f'must be a number of bytes or text such as "6GiB", not {text!r}') from error


def _say(text: object = "") -> None:
    print(text)  # noqa: T201


def _repack(args: argparse.Namespace) -> int:
    target = repack(
        args.source, args.target, predictor=args.predictor, predictor_bits=args.predictor_bits,
        predictor_group_size=args.predictor_group_size, revision=args.revision, local_files_only=args.local_files_only,
    )  # fmt: skip
    _say(_describe(FlashStore.open_folder(target)))
    _say(f"\nload it:  import hf_flash; pipeline('text-generation', model={str(target)!r})")
    return 0


def _calibrate(args: argparse.Namespace) -> int:
    _say(calibration.run(args))
    return 0


def _eval(args: argparse.Namespace) -> int:
    report = evaluation.evaluate(
        args.folder, args.text, tokens=args.tokens, context=args.context, memory_budget=args.memory_budget, dtype=args.dtype,
    )  # fmt: skip
    _say(evaluation.describe(report))
    tasks = [task for task in args.tasks.split(",") if task]
    if tasks:
        report["tasks"] = evaluation.evaluate_tasks(
            args.folder, tasks, stock=args.stock, limit=args.limit, include_path=args.include_path, dtype=args.dtype,
            memory_budget=args.memory_budget,
        )  # fmt: skip
        _say("\n" + evaluation.describe_tasks(report["tasks"]))
    if args.json:
        write_json(args.json, report)
    if args.plots:
        _say("\n".join(map(str, plot(report, args.plots))))
    return 0


def _verify(args: argparse.Namespace) -> int:
    folder = Path(args.folder or f"{Path(args.model).name}-flash")
    if not folder.exists():
        repack(args.model, folder)
    if FlashStore.open_folder(folder).calibration is None:
        found = calibration.calibrate(
            folder, args.calibration_text, samples=args.samples, memory_budget=args.memory_budget, context=args.context,
        )  # fmt: skip
        _say(calibration.describe(found) + "\n")
    args.folder, args.stock = folder, args.model if args.with_stock else None
    return _eval(args)


def _plan(args: argparse.Namespace) -> int:
    found = planner.plan(
        args.model, memory=args.memory, predictor=args.predictor, dtype=args.dtype, disk=args.disk, active=args.active,
        fresh=args.fresh, predicted=args.predicted, tokens=args.tokens, prompt_tokens=args.prompt_tokens,
        revision=args.revision,
    )  # fmt: skip
    _say(json.dumps(found.to_dict(), indent=2) if args.json == "-" else found.describe())
    if args.json and args.json != "-":
        write_json(Path(args.json), found.to_dict())
    return 0


def _bench(args: argparse.Namespace) -> int:
    if (args.model is None) == (args.preset is None) or (args.preset and args.plain):
        raise ConfigError("nothing to measure, or too much", expected="either a repacked MODEL or --preset tiny")
    settings = {name: getattr(args, name) for name in ("tokens", "prompt_tokens", "memory", "headroom", "repeats", "timeout")}
    settings = {name: value for name, value in settings.items() if value is not None}
    settings |= {"cap": args.cap, "check": args.check, "notes": args.note}
    settings["arguments"] = {k: v for item in args.flash_arg for k, v in item.items()}
    names = args.systems and [name.strip() for name in args.systems.split(",") if name.strip()]
    usual = [] if args.sweep else bench.TINY if args.preset else bench.default_systems(args.plain)
    settings["systems"] = [*(names or usual), *args.system, *args.sweep]
    report = bench.bench_tiny(**settings) if args.preset else bench.bench(args.model, plain=args.plain, **settings)
    _say(json.dumps(report, indent=2) if args.json == "-" else describe_bench(report))
    if args.json and args.json != "-":
        write_json(Path(args.json), report)
    if args.plot:
        plot_bench(report, args.plot)
    return 0 if report.get("same_tokens", True) else 1


def _serve(args: argparse.Namespace) -> int:
    try:
        from .server import Server
    except ImportError as error:
        raise ConfigError("serving needs more packages", got=error, hint="pip install 'hf-flash[serve]'") from error
    configure(**{name: getattr(args, name) for name in ARGUMENTS})
    server = Server(
        args.model, host=args.host, port=args.port, dtype=args.dtype, attn_implementation=args.attn_implementation,
        chat_template=args.chat_template, kv_cache_bytes=args.kv_cache if args.continuous_batching else None,
        enable_cors=args.enable_cors, log_level=args.log_level,
    )  # fmt: skip
    _say(server.describe())
    sys.stdout.flush()
    server.run()
    return 0


def _restore(args: argparse.Namespace) -> int:
    _say(restore(args.folder, args.target))
    return 0


def _push(args: argparse.Namespace) -> int:
    info = push(
        args.folder, args.repo_id, private=args.private, revision=args.revision, create_pr=args.create_pr,
        commit_message=args.commit_message,
    )  # fmt: skip
    _say(info)
    return 0


def _inspect(args: argparse.Namespace) -> int:
    store = FlashStore.open_folder(args.folder)
    problems = store.check(lambda layers: tqdm(layers, desc="Checking", unit="layer", delay=1)) if args.check else []
    if args.json:
        _say(json.dumps(_facts(store) | {"checked": args.check, "problems": problems}, indent=2))
    else:
        _say(_describe(store))
        if args.check:
            _say("\n".join(problems) if problems else "checksums         all right")
    return 1 if problems else 0


def _facts(store: FlashStore) -> dict[str, Any]:
    first = store.layers[0]
    return {
        "source": store.metadata["source"],
        "revision": store.metadata["revision"],
        "layers": len(store.layers),
        "d_model": first.d_model,
        "d_ff": first.d_ff,
        "dtype": str(first.dtype).removeprefix("torch."),
        "bundle_bytes": first.bundle_bytes,
        "bundles_bytes": store.nbytes,
        "alignment": ALIGNMENT,
        "predictors": {variant: path.stat().st_size for variant, path in store.predictors.items()},
        "calibration": stored_report(store),
        "placed_layers": sum(layer.place is not None for layer in store.layers),
        "files": [path.name for path in store.files],
    }


def _describe(store: FlashStore) -> str:
    facts = _facts(store)
    predictors = ", ".join(f"{name} ({format_bytes(size)})" for name, size in facts["predictors"].items())
    rows = [
        ("source", f"{facts['source']} {facts['revision']}".rstrip()),
        ("FFN layers", f"{facts['layers']}, d_model {facts['d_model']}, d_ff {facts['d_ff']}, {facts['dtype']}"),
        ("bundles", f"{format_bytes(facts['bundles_bytes'])}, {format_bytes(facts['bundle_bytes'])} a neuron"),
        ("alignment", f"every layer on {ALIGNMENT} bytes"),
        ("predictors", predictors or "none"),
        ("calibration", _describe_calibration(facts["calibration"])),
        ("placement", _describe_placement(facts)),
        ("files", f"{len(facts['files'])}, {facts['files'][0]} ..."),
    ]
    return "\n".join(f"{name:<18}{value}" for name, value in rows)


def _describe_placement(facts: dict[str, Any]) -> str:
    if not facts["placed_layers"]:
        return "none: neurons lie in the order of their ids"
    placed = calibration.describe_placement(facts["calibration"]) if facts["calibration"] else "none"
    return placed if placed != "none" else f"{facts['placed_layers']} of {facts['layers']} layers"


def _describe_calibration(report: dict[str, Any] | None) -> str:
    if report is None:
        return "none"
    ranks = [layer["lowrank"]["rank"] for layer in report["layers"]]
    reached = "reached" if report["reached"] else "not reached"
    return f"on {report['text']['tokens']} tokens; ranks {min(ranks)} to {max(ranks)}, targets {reached}"


# --- demo ----------------------------------------------------------------------------------------------------------


def _demo(args: argparse.Namespace) -> int:
    """Repack, generate with the FFN on flash, and hold `predictor="none"` against the stock model."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(prefix="hf-flash-demo-") as folder:
        packed = repack(args.model, Path(folder) / "packed")
        _say(f"\n{_describe(FlashStore.open_folder(packed))}\n")
        tokenizer = AutoTokenizer.from_pretrained(packed)
        inputs = tokenizer(args.prompt, return_tensors="pt")
        budget = FlashOffloadConfig(memory_budget=args.memory_budget)

        model = AutoModelForCausalLM.from_pretrained(packed, quantization_config=budget)
        model.generate(**inputs, max_new_tokens=2, do_sample=False)
        stats(model, reset=True)
        text, seconds = _generate(model, inputs, args.max_new_tokens)
        found = stats(model)
        _say(f"{tokenizer.decode(text, skip_special_tokens=True)}\n")
        dense = AutoModelForCausalLM.from_pretrained(args.model)
        dense.generate(**inputs, max_new_tokens=2, do_sample=False)
        stock, stock_seconds = _generate(dense, inputs, args.max_new_tokens)
        speed = f"{args.max_new_tokens / seconds:.0f}, the stock model in memory {args.max_new_tokens / stock_seconds:.0f}"
        _say(f"{found}\n{'tokens per second':<20}{speed}\n")

        budget = FlashOffloadConfig(memory_budget=args.memory_budget, predictor="none")
        exact, _ = _generate(
            AutoModelForCausalLM.from_pretrained(packed, quantization_config=budget), inputs, args.max_new_tokens
        )
    _say(f"the same tokens as the stock model?  predictor='none': {_yes(exact == stock)}, quantized: {_yes(text == stock)}")
    return 0 if exact == stock else 1


def _generate(model: Any, inputs: Any, tokens: int) -> tuple[list[int], float]:
    start = time.perf_counter()
    output = model.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
    return output[0].tolist(), time.perf_counter() - start


def _yes(same: bool) -> str:
    return "yes" if same else "NO"
