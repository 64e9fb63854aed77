"""SIGKILL while something is written: the source is whole, the target whole or not there, and the next run ends as if nothing
had been.

Each job is killed at random moments of its writing, and once before every event of it (deaths.py).
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import huggingface_hub.constants as hub_constants
import torch
from transformers import AutoModelForCausalLM

import hf_flash
import hf_flash.calibration.job  # calibrate imports it: not in every child
from hf_flash import FlashOffloadConfig, TargetExistsError
from hf_flash.packing import checkpoint_folder
from hf_flash.store.layout import FlashStore
from tests.conftest import make_opt
from tests.hub_server import TOKEN, Hub, serve

from .children import Child, Figures, Say, Silent, Soak, ask
from .deaths import Events, evenly

LIMIT_S: Final = 120
KILLS: Final = 300  # at random moments, over all jobs
EVENTS: Final = 1000  # of a job, at most: all of them, in practice
REPO: Final = "me/soak"
PROMPT: Final = torch.tensor([[2, 11, 7, 30, 45, 7]])
TOKENS: Final = torch.randint(4, 96, (1200,), generator=torch.Generator().manual_seed(0))
QUICK: Final[dict[str, Any]] = {"samples": 24, "context": 32, "rank": 8, "epochs": 1}
NO_PREDICTOR: Final = {"quantization_config": FlashOffloadConfig(predictor="none")}
Tree = Mapping[str, str]


@dataclass(frozen=True)
class Scene:
    """What all jobs start from, never written to, and the folder that one of them works in."""

    plain: Path
    packed: Path
    sharded: Path
    at: Path
    hub: Hub


@dataclass(frozen=True)
class Job:
    """Something that writes.

    Attributes:
        write: does it; calls its second argument when loading is over and writing begins.
        prepare: makes what is in the working folder before.
        half: what is wrong with what a killed run left, "" if nothing; gets the tree of an undisturbed run.
    """

    write: Callable[[Scene, Callable[[], Any]], None]
    half: Callable[[Scene, Tree], str]
    prepare: Callable[[Scene], None] = lambda scene: None


_TURN: Final = re.compile(r"(?<=-of-\d{5})-\d+(?=\.safetensors)")


def tree(folder: Path) -> dict[str, str]:
    """Every name below a folder, with a checksum of what it is.

    The number that a save gives the names of its files, so that they are new ones, is left out; what is left over of an earlier
    save keeps it.
    """
    found: dict[str, str] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        plain = _TURN.sub("", name)
        found[name if plain in found else plain] = _sum(path)
    return found


def _sum(path: Path) -> str:
    if path.is_symlink():
        return os.readlink(path)
    if not path.is_file():
        return "folder"
    data = path.read_bytes()
    if path.name.endswith(".index.json"):
        data = _TURN.sub("", data.decode()).encode()
    return hashlib.sha256(data).hexdigest()


def _below(folder: str, found: Tree) -> dict[str, str]:
    return {name: value for name, value in found.items() if name == folder or name.startswith(f"{folder}/")}


# --- the jobs -------------------------------------------------------------------------------------------------------------


def repack(scene: Scene, begin: Callable[[], Any]) -> None:
    begin()
    with contextlib.suppress(TargetExistsError):
        hf_flash.repack(scene.plain, scene.at / "out")


def restore(scene: Scene, begin: Callable[[], Any]) -> None:
    begin()
    with contextlib.suppress(TargetExistsError):
        hf_flash.restore(scene.packed, scene.at / "out")


def load(scene: Scene, begin: Callable[[], Any]) -> None:
    """A plain checkpoint for the first time: its FFN is bundled into the flash cache."""
    begin()
    wish = FlashOffloadConfig(cache_dir=str(scene.at / "cache"))
    model = AutoModelForCausalLM.from_pretrained(scene.plain, quantization_config=wish)
    model.generate(PROMPT, max_new_tokens=2, do_sample=False)


def calibrate(scene: Scene, begin: Callable[[], Any]) -> None:
    begin()
    hf_flash.calibrate(scene.at / "flash", TOKENS, **QUICK)


def save(scene: Scene, begin: Callable[[], Any]) -> None:
    """A model with other weights over the folder that it was loaded from, in several files of other weights."""
    small_shards()
    model = AutoModelForCausalLM.from_pretrained(scene.at / "flash")
    numbers = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, weight in sorted(model.named_parameters()):
            weight.copy_(torch.randn(weight.shape, generator=numbers) / 8)
    begin()
    model.save_pretrained(scene.at / "flash")


def small_shards() -> None:
    """Some files of other weights instead of one."""
    checkpoint_folder._SHARD_BYTES = 16_000  # type: ignore[misc]


def push(scene: Scene, begin: Callable[[], Any]) -> None:
    os.environ |= {"HF_FLASH_CACHE": str(scene.at / "cache"), "HF_TOKEN": TOKEN, "NO_PROXY": "127.0.0.1"}
    hub_constants.ENDPOINT, hub_constants.HF_HUB_DISABLE_XET = scene.hub.url, True
    hub_constants.HUGGINGFACE_CO_URL_TEMPLATE = scene.hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    begin()
    hf_flash.push(scene.packed, REPO)


def copy_packed(scene: Scene) -> None:
    shutil.copytree(scene.packed, scene.at / "flash")


def copy_sharded(scene: Scene) -> None:
    """With as many files of other weights as `save` will write."""
    shutil.copytree(scene.sharded, scene.at / "flash")


def forget_repository(scene: Scene) -> None:
    with scene.hub.lock:
        scene.hub.repos.clear()
        scene.hub.blobs.clear()


# --- what a killed run may leave --------------------------------------------------------------------------------------------


def out_or_nothing(scene: Scene, wanted: Tree) -> str:
    found = _below("out", tree(scene.at))
    return "" if found in ({}, _below("out", wanted)) else "a target that is not whole"


def entry_or_nothing(scene: Scene, wanted: Tree) -> str:
    """In the flash cache, where names with a dot are nothing yet."""
    found = {name: value for name, value in tree(scene.at).items() if not name.startswith("cache/.")}
    whole = {name: value for name, value in wanted.items() if not name.startswith("cache/.")}
    return "" if found in ({}, {"cache": "folder"}, whole) else "an entry of the flash cache that is not whole"


def still_the_model(scene: Scene, wanted: Tree) -> str:
    """Calibration adds predictors and moves neurons: what is computed without a predictor stays the same."""

    def compare(say: Say) -> None:
        if problems := FlashStore.open_folder(scene.at / "flash").check():
            say(problems)
        if logits(scene.at / "flash", **NO_PREDICTOR) != logits(scene.packed, **NO_PREDICTOR):
            say("other logits")
        logits(scene.at / "flash")

    said, wrong = ask(compare)
    return wrong or ", ".join(map(str, said))


def old_or_new(scene: Scene, wanted: Tree) -> str:
    """All weights as before, or all as they were to become."""

    def compare(say: Say) -> None:
        found = states(scene.at / "flash")
        old, new = states(scene.at.parent / "save-old"), states(scene.at.parent / "save-new")
        if found not in (old, new):
            say([f"{sum(found[n] == old[n] for n in found)} tensors old, {sum(found[n] == new[n] for n in found)} new"])

    said, wrong = ask(compare)
    return wrong or ", ".join(map(str, said))


def nothing_or_all_pushed(scene: Scene, wanted: Tree) -> str:
    time.sleep(0.02)  # what was sent arrives
    with scene.hub.lock:
        files = set(scene.hub.files(REPO)) if REPO in scene.hub.repos else set()
    whole = {path.name for path in scene.packed.iterdir()} | {"README.md", ".gitattributes"}
    return "" if files in (set(), {".gitattributes"}, whole) else f"a repository with {sorted(files)}"


def logits(folder: Path, **arguments: Any) -> str:
    with torch.no_grad():
        return _digest(AutoModelForCausalLM.from_pretrained(folder, **arguments)(PROMPT).logits)


def states(folder: Path) -> dict[str, str]:
    """A checksum of every tensor of a model outside its FFN matrices."""
    return {name: _digest(value) for name, value in AutoModelForCausalLM.from_pretrained(folder).state_dict().items()}


def _digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


JOBS: Final[dict[str, Job]] = {
    "repack": Job(repack, out_or_nothing),
    "restore": Job(restore, out_or_nothing),
    "load": Job(load, entry_or_nothing),
    "calibrate": Job(calibrate, still_the_model, copy_packed),
    "save": Job(save, old_or_new, copy_sharded),
    "push": Job(push, nothing_or_all_pushed, forget_repository),
}


# --- killing ----------------------------------------------------------------------------------------------------------------


def run(soak: Soak, figures: Figures) -> None:
    """The part."""
    with scene_of(soak.work / "kill") as scene:
        for name, job in JOBS.items():
            _Killer(scene, name, job, soak, figures).run()


@contextlib.contextmanager
def scene_of(work: Path) -> Iterator[Scene]:
    """Made in a child, so that this process has no threads of torch's that a child would miss."""
    work.mkdir()

    def make(say: Say) -> None:
        make_opt(work / "plain")
        hf_flash.repack(work / "plain", work / "packed")
        small_shards()
        hf_flash.repack(work / "plain", work / "sharded")

    said, wrong = ask(make)
    assert not wrong, (said, wrong)
    with contextlib.redirect_stderr(io.StringIO()), serve() as hub:  # its handlers complain of clients that are gone
        yield Scene(work / "plain", work / "packed", work / "sharded", work / "at", hub)


class _Killer:
    """Kills one job again and again."""

    def __init__(self, scene: Scene, name: str, job: Job, soak: Soak, figures: Figures) -> None:
        self.scene, self.name, self.job, self.soak, self.figures = scene, name, job, soak, figures

    def run(self) -> None:
        self.sources = tree(self.scene.plain), tree(self.scene.packed)
        try:
            self.duration = self._undisturbed()
            events = self._count_events()
        except RuntimeError as error:
            self.figures.fault(f"{self.name}, undisturbed: {error}")
            return
        draw, kills = self.soak.random("kill", self.name), self.soak.count(KILLS // len(JOBS))
        for delay in [draw.uniform(0, 1.05 * self.duration) for _ in range(kills)]:
            self._once(f"after {1000 * delay:.1f} of {1000 * self.duration:.1f} ms", lambda delay=delay: self._kill(delay))
        for last in evenly(events, self.soak.count(EVENTS)):
            self._once(f"before event {last} of {events}", lambda last=last: self._die(last))

    def _fresh(self) -> None:
        shutil.rmtree(self.scene.at, ignore_errors=True)
        self.scene.at.mkdir()
        self.job.prepare(self.scene)

    def _undisturbed(self) -> float:
        """Seconds that writing takes; notes what it leaves."""
        self._fresh()
        if self.name == "save":
            shutil.copytree(self.scene.at / "flash", self.scene.at.parent / "save-old", dirs_exist_ok=True)
        seconds, _ = self._finish()
        if self.name == "save":
            shutil.copytree(self.scene.at / "flash", self.scene.at.parent / "save-new", dirs_exist_ok=True)
        self.wanted = self._state()
        return seconds

    def _count_events(self) -> int:
        self._fresh()
        _, counted = self._finish(Events().watch)
        if self._state() != self.wanted:
            raise RuntimeError(f"two runs differ: {_difference(self._state(), self.wanted)}")
        return counted

    def _state(self) -> dict[str, str]:
        """What a run leaves, here and on the Hub."""
        with self.scene.hub.lock:
            pushed = self.scene.hub.files(REPO) if REPO in self.scene.hub.repos else {}
        return tree(self.scene.at) | {f"hub/{path}": blob for path, blob in pushed.items()}

    def _finish(self, watch: Callable[[], Events] = Events) -> tuple[float, int]:
        """Run the job to its end; how many seconds writing took, and how many events were seen."""

        def work(say: Say) -> None:
            began: list[Any] = []
            self.job.write(self.scene, lambda: began.extend([watch(), time.monotonic()]))
            say([time.monotonic() - began[1], began[0].count])

        said, wrong = ask(work, LIMIT_S)
        if wrong:
            raise RuntimeError(wrong)
        return said[0][0], said[0][1]

    def _kill(self, delay: float) -> int:
        """From outside, so long after writing has begun."""

        def work(say: Say) -> None:
            self.job.write(self.scene, lambda: say("begin"))
            say("end")

        child = Child(work)
        for _ in child.hear(LIMIT_S):
            time.sleep(delay)
            child.kill()
            break
        return child.end()

    def _die(self, last: int) -> int:
        def work(say: Say) -> None:
            self.job.write(self.scene, Events(last).watch)

        child = Child(work)
        list(child.hear(LIMIT_S))
        return child.end()

    def _once(self, when: str, kill: Callable[[], int]) -> None:
        """Kill, look at what is there, run again, look again."""
        self._fresh()
        try:
            code = kill()
            ended = {-9: f"{self.name} killed", 0: "at their end already"}.get(code)
            if ended is None:
                raise RuntimeError(f"ended with {code}")
            for problem in (self._sources(), self.job.half(self.scene, self.wanted)):
                if problem:
                    raise RuntimeError(problem)
            self._finish()
            if problem := self._sources() or self._left():
                raise RuntimeError(f"the next run: {problem}")
        except (RuntimeError, Silent) as error:
            self.figures.fault(f"{self.name} killed {when}: {error}")
        else:
            self.figures.outcomes[ended] += 1

    def _sources(self) -> str:
        return "" if (tree(self.scene.plain), tree(self.scene.packed)) == self.sources else "the source has changed"

    def _left(self) -> str:
        """What is otherwise than after an undisturbed run. An empty lock file beside a target is no matter."""
        found = {name: value for name, value in self._state().items() if name != ".out.lock"}
        return _difference(found, self.wanted)


def _difference(found: Tree, wanted: Tree) -> str:
    names = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
    how = [f"{name} ({'left over' if name not in wanted else 'missing' if name not in found else 'other'})" for name in names]
    return ", ".join(how[:3]) + (f" and {len(how) - 3} more" if len(how) > 3 else "")
