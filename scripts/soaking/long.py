"""Parts that use a loaded model: interrupted, for long, again and again, from threads, from forks; and a changing source.

All with the shipped model, in a budget that holds some 30 neurons a layer, so that every token reads.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import hf_flash
from hf_flash import FlashOffloadConfig, HfFlashError
from tests.conftest import TINY_OPT, make_opt

from .children import Child, Figures, Say, Silent, Soak, ask, descriptors, status

READERS: Final = ("direct", "mmap")
BUDGET: Final = "9MB"
LIMIT_S: Final = 30  # of silence: everything here says something every second
PROMPT: Final = torch.arange(5, 53)[None]
NEW: Final = 8  # tokens a generation
GROWTH_KIB: Final = 8 << 10  # what a process may have more at the end
SLOWER: Final = 1.25  # than a fresh model that answers in turn with the old one


def load(reader: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        TINY_OPT, quantization_config=FlashOffloadConfig(memory_budget=BUDGET, reader=reader)
    )


def answer(model: Any, ids: torch.Tensor = PROMPT, new: int = NEW) -> list[list[int]]:
    found: list[list[int]] = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, do_sample=False
    ).tolist()
    return found


def prompts(count: int, longest: int, draw: random.Random) -> list[torch.Tensor]:
    """Batches of 1 to 3 rows of 4 to `longest` tokens."""
    numbers = torch.Generator().manual_seed(draw.randrange(1 << 30))
    shapes = [(draw.choice((1, 1, 2, 3)), draw.randint(4, longest)) for _ in range(count)]
    return [torch.randint(5, 4000, shape, generator=numbers) for shape in shapes]


def hear(figures: Figures, name: str, job: Callable[[Say], None], limit_s: float = LIMIT_S) -> list[Any]:
    """What a job says in a child; a fault for each {"wrong": ...} in it, and for an end that is none."""
    child, said, failed = Child(job), [], False
    try:
        for message in child.hear(limit_s):
            problem = isinstance(message, dict) and (message.get("wrong") or message.get("error"))
            failed = failed or bool(problem)
            said.append(message)
            if problem:
                figures.fault(f"{name}: {problem}")
    except Silent as error:
        figures.fault(f"{name}: {error} after {len(said)} messages, the last {said[-1:]}")
        failed = True
    code = child.end()
    if code and not failed:
        figures.fault(f"{name}: ended with {code}")
    return said


# --- interrupted ------------------------------------------------------------------------------------------------------------


def interrupt(soak: Soak, figures: Figures) -> None:
    """Real signals at random moments of a prompt, by a handler that raises. What follows is as if nothing had been."""
    total = soak.count(10_000, 20)
    for reader in READERS:
        draw = soak.random("interrupt", reader)
        said = hear(figures, reader, partial(interrupted, reader, total // len(READERS), draw))
        for message in said:
            figures.outcomes.update(message.get("outcomes", {}))


def interrupted(reader: str, total: int, draw: random.Random, say: Say) -> None:
    """Until `total` prompts were interrupted; after every tenth, look whether the model is as it was."""
    signal.signal(signal.SIGALRM, _raise)
    model = load(reader)
    wanted = answer(model)
    start = time.monotonic()
    model(PROMPT)
    longest = 1.1 * (time.monotonic() - start)
    count = 0
    while count < total:
        ended = _interrupt(lambda: model(PROMPT), draw.uniform(0.0005, longest))
        count += ended == "interrupted"
        say({"outcomes": {f"{reader} prompts {ended}": 1}})
        if ended == "interrupted" and (count % 10 == 0 or count == total):
            if answer(model) != wanted:
                say({"wrong": f"other tokens after {count} interruptions"})
                return
            if problem := strange(hf_flash.stats(model, reset=True)):
                say({"wrong": f"stats after {count} interruptions: {problem}"})
                return


def _raise(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


@torch.no_grad()
def _interrupt(call: Callable[[], Any], delay: float) -> str:
    try:
        signal.setitimer(signal.ITIMER_REAL, delay)
        call()
        signal.setitimer(signal.ITIMER_REAL, 0)
        return "at their end before"
    except KeyboardInterrupt:
        return "interrupted"


def strange(stats: Any) -> str:
    """What cannot be in a model's statistics, "" if nothing."""
    counters = stats.counters
    if negative := {name: value for name, value in vars(counters).items() if value < 0}:
        return f"negative: {negative}"
    if counters.hits > counters.selected or counters.ahead_used > counters.ahead:
        return f"more hits than neurons: {counters}"
    if stats.dram_bytes > stats.budget_bytes:
        return f"{stats.dram_bytes} bytes in a budget of {stats.budget_bytes}"
    return "" if counters.calls and counters.read_bytes else f"nothing was read: {counters}"


# --- for long ---------------------------------------------------------------------------------------------------------------


def decode(soak: Soak, figures: Figures) -> None:
    """Two threads on one model, prompts and batches that change: memory, descriptors, threads and speed stay flat."""
    total = soak.count(20_000, 96)
    said = hear(figures, "decode", partial(decoded, total, prompts(soak.count(12, 3), 40, soak.random("decode"))))
    for message in said:
        figures.outcomes.update(message.get("outcomes", {}))
    samples = [message["sample"] for message in said if "sample" in message]
    if len(samples) >= 2:
        flat(figures, samples[0], samples[-1])
    judge_speed(figures, *([message[key] for message in said if key in message] for key in ("s", "old s", "fresh s")))


def decoded(total: int, asked: Sequence[torch.Tensor], say: Say) -> None:
    wanted = [answer(load("direct"), ids) for ids in asked]  # each by a model that has seen nothing else
    model, lock, tokens = load("direct"), threading.Lock(), 0

    def work(until: int, mine: random.Random) -> None:
        nonlocal tokens
        while tokens < until:
            at = mine.randrange(len(asked))
            start = time.monotonic()
            right = answer(model, asked[at]) == wanted[at]
            with lock:
                tokens += NEW
                say({"s": time.monotonic() - start, "outcomes": {"tokens": NEW}} if right else {"wrong": f"prompt {at}"})

    for share in range(1, 11):
        draws = [random.Random(2 * share), random.Random(2 * share + 1)]
        running = [threading.Thread(target=work, args=[total * share // 10, mine]) for mine in draws]
        for thread in running:
            thread.start()
        for thread in running:
            thread.join()
        say({"sample": sample()})  # of a process whose threads have ended
    compare_speed(model, asked, max(2, total // 100), say)


def sample() -> dict[str, int]:
    """What this process has: anonymous memory in KiB, descriptors, threads."""
    return {"RssAnon KiB": status("RssAnon"), "descriptors": descriptors(), "threads": status("Threads")}


def flat(figures: Figures, first: dict[str, int], last: dict[str, int]) -> None:
    """Whether the last sample is like the first, after warming up."""
    allowed = {"RssAnon KiB": GROWTH_KIB, "descriptors": 0, "threads": 4}  # a pool of readers starts its threads when it must
    for name, before in first.items():
        figures.measured[name] = f"{before} to {last[name]}"
        if last[name] > before + allowed[name]:
            figures.fault(f"{name} grew from {before} to {last[name]}")


def compare_speed(old: Any, asked: Sequence[torch.Tensor], rounds: int, say: Say) -> None:
    """The model after all that, and a fresh one, in turn: the machine's own speed changes by more than what is looked for."""
    models = {"old s": old, "fresh s": load("direct")}
    for at in range(rounds + 1):
        for name, model in sorted(models.items(), reverse=bool(at % 2)):
            start = time.monotonic()
            answer(model, asked[at % len(asked)])
            if at:  # the first warms up
                say({name: time.monotonic() - start})


def judge_speed(figures: Figures, seconds: Sequence[float], old: Sequence[float], fresh: Sequence[float]) -> None:
    """Every thousand tokens for the reader, and the end against a fresh model, where there are enough of them to tell."""
    if not fresh:  # the process ended before: that is said already
        return
    per = 1000 // NEW
    thousands = [1000 * statistics.median(seconds[at : at + per]) / NEW for at in range(0, len(seconds), per)]
    between = f"each thousand between {min(thousands):.1f} and {max(thousands):.1f}"
    figures.measured["ms a token"] = f"{thousands[0]:.1f} to {thousands[-1]:.1f} ({between})"
    ratio = statistics.median(one / other for one, other in zip(old, fresh, strict=False))
    figures.measured["the end over a fresh model in turn"] = f"{ratio:.2f}"
    if len(old) >= 100 and ratio > SLOWER:
        figures.fault(f"at the end an answer takes {ratio:.2f} times what a fresh model needs")


def reload(soak: Soak, figures: Figures) -> None:
    """Load, generate, drop: memory and descriptors come back."""
    total = soak.count(50, 4)
    said = hear(figures, "reload", partial(reloaded, total))
    figures.outcomes["loads and drops"] += sum("sample" in message for message in said)
    samples = [message["sample"] for message in said if "sample" in message]
    if len(samples) >= 4:
        flat(figures, samples[len(samples) // 5 + 1], samples[-1])


def reloaded(total: int, say: Say) -> None:
    wanted = answer(load("direct"))
    for at in range(total):
        if answer(load(READERS[at % 2])) != wanted:
            say({"wrong": f"other tokens at load {at}"})
        say({"sample": sample()})


def threads(soak: Soak, figures: Figures) -> None:
    """Eight threads generate on one model at once."""
    for reader in READERS:
        said = hear(figures, reader, partial(threaded, reader, soak.count(100), soak.random("threads", reader)))
        figures.outcomes["right generations"] += sum(message == "right" for message in said)


def threaded(reader: str, each: int, draw: random.Random, say: Say) -> None:
    asked, alone = prompts(8, 12, draw), load(reader)
    wanted = [answer(alone, ids, 4) for ids in asked]
    model, lock = load(reader), threading.Lock()

    def work(number: int) -> None:
        for at in range(each):
            chosen = (number + at) % len(asked)
            try:
                right = answer(model, asked[chosen], 4) == wanted[chosen]
                problem = "" if right else f"thread {number}, generation {at}: other tokens"
            except Exception as error:  # noqa: BLE001  whatever it is, it is reported
                problem = f"thread {number}, generation {at}: {error!r}"
            with lock:
                say({"wrong": problem} if problem else "right")

    running = [threading.Thread(target=work, args=[number]) for number in range(8)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()


# --- a source that changes ----------------------------------------------------------------------------------------------


def replaced(new: Path, old: Path) -> None:
    """As downloads do: another file takes the name."""
    shutil.copyfile(new, old.with_suffix(".new"))
    os.replace(old.with_suffix(".new"), old)


def overwritten(new: Path, old: Path) -> None:
    """As a careless copy does: other bytes in the same file."""
    with open(old, "r+b") as file:
        file.write(new.read_bytes())


def cut(new: Path, old: Path) -> None:
    os.truncate(old, old.stat().st_size // 2)


def changing_source(soak: Soak, figures: Figures) -> None:
    """The source becomes another model while it is repacked: that is noticed, or what comes out is one of the two."""
    work = soak.work / "changing-source"
    versions = [work / "a", work / "b"]
    said, wrong = ask(lambda say: make_versions(versions, say))
    if wrong:
        figures.fault(f"made no source: {wrong}")
        return
    draw = soak.random("changing-source")
    for at in range(soak.count(150, 3)):
        change = (replaced, overwritten, cut)[at % 3]
        delay = draw.uniform(0, 1.1 * said[0])
        change_once(figures, change, delay, work, versions)


def make_versions(versions: Sequence[Path], say: Say) -> None:
    """Two models of one shape, large enough to be caught in the middle; says how long one takes to repack."""
    for seed, folder in enumerate(versions):
        make_opt(folder, seed=seed, hidden_size=256, word_embed_proj_dim=256, ffn_dim=1024, num_hidden_layers=4)
    start = time.monotonic()
    hf_flash.repack(versions[0], versions[0].with_name("timed"))
    say(time.monotonic() - start)


def change_once(
    figures: Figures, change: Callable[[Path, Path], None], delay: float, work: Path, versions: Sequence[Path]
) -> None:
    for name in ("source", "out", "back"):
        shutil.rmtree(work / name, ignore_errors=True)
    (work / ".out.lock").unlink(missing_ok=True)
    shutil.rmtree(work / ".out.partial", ignore_errors=True)
    shutil.copytree(versions[0], work / "source")
    case = f"{change.__name__} after {1000 * delay:.1f} ms"
    child = Child(partial(repack_and_compare, work, versions))
    outcome = ""
    try:
        for message in child.hear(LIMIT_S):
            if message == "begin":
                time.sleep(delay)
                change(versions[1] / "model.safetensors", work / "source" / "model.safetensors")
            elif "outcome" in message:
                outcome = message["outcome"]
            else:
                outcome = "wrong: " + str(message)
    except Silent as error:
        outcome = f"wrong: {error}"
    if (code := child.end()) and not outcome:
        outcome = f"wrong: ended with {code}"
    if outcome.startswith("wrong"):
        figures.fault(f"{case}: {outcome.removeprefix('wrong: ')}")
    else:
        figures.outcomes[outcome] += 1


def repack_and_compare(work: Path, versions: Sequence[Path], say: Say) -> None:
    say("begin")
    try:
        hf_flash.repack(work / "source", work / "out")
    except HfFlashError:
        say({"outcome": "noticed" if not (work / "out").exists() else "wrong: an error, and a target"})
        return
    found = digests(hf_flash.restore(work / "out", work / "back"))
    same = [found == digests(version) for version in versions]
    names = {(True, False): "the old model", (False, True): "the new model", (False, False): "wrong: a mixture"}
    say({"outcome": names[(same[0], same[1])]})


def digests(folder: Path) -> dict[str, str]:
    state = load_file(folder / "model.safetensors")
    return {name: hashlib.sha256(value.numpy().tobytes()).hexdigest() for name, value in state.items()}


# --- forks ----------------------------------------------------------------------------------------------------------------


def fork(soak: Soak, figures: Figures) -> None:
    """Workers forked from a process that loaded a model with two threads, as `gunicorn --preload` does."""
    for reader in READERS:
        said, wrong = ask(partial(one_answer, reader))
        if wrong:
            figures.fault(f"{reader}, no fork: {wrong}")
            continue
        for _ in range(soak.count(10)):
            for message in hear(figures, reader, partial(forked, reader, said[0])):
                figures.outcomes[f"{reader} workers right"] += message == "right"


def one_answer(reader: str, say: Say) -> None:
    say(answer(load(reader)))


def forked(reader: str, wanted: list[list[int]], say: Say) -> None:
    torch.set_num_threads(2)
    model = load(reader)
    workers = [Child(lambda tell: tell(answer(model) == wanted)) for _ in range(2)]
    for worker in workers:
        try:
            said = list(worker.hear(LIMIT_S / 2))
            say("right" if said == [True] else {"wrong": f"a worker said {said}"})
        except Silent as error:
            say({"wrong": f"a forked worker hangs: {error}"})
        worker.end()


PARTS: Final[dict[str, Callable[[Soak, Figures], None]]] = {
    "interrupt": interrupt,
    "decode": decode,
    "reload": reload,
    "threads": threads,
    "changing-source": changing_source,
    "fork": fork,
}
