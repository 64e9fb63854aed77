"""`hf-flash plan`: how fast a model will be here, and with how much memory, before anything is downloaded or repacked.

The cost of a decoded token, in the paper's frame (sections 2 and 3, table 3), L layers:

    token = head + sum over the layers of (rest + predict + manage(f) + io(f) + compute)
    f     = neurons that a token needs and the layer's window does not hold

f follows from the budget, which is divided as loading divides it (budget/plan.py), and from what tokens need
(budget/demand.py): *measured* on text, for every layer, if the model was calibrated. Otherwise *assumed*, from the paper's
figures for OPT-6.7B: 3 % of the neurons active, of which 24 % were not used in the 4 tokens before; or *given*. These two say
little of windows that hold more than 4 tokens, and what they leave open is taken for the worse. Reports say which it was.

All times are measured on this machine (measuring.py), in a few layers of the model's real shape, for some f; between them they
are interpolated.

Left out: the prompt (it is computed, not read, most of the time); attention over a long context; lookahead, which hides reads
where a core is free; what the disk adds before the page cache holds the store, where memory for that is left.

A mixture of experts has a router and no predictor. What it costs is in mixture.py.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from hf_flash.budget.demand import Demand, everything, measured, supposed
from hf_flash.budget.divide import divide_memory, expected_demand, stored_report
from hf_flash.budget.expert_plan import ExpertPlan
from hf_flash.budget.plan import MemoryPlan, ceiling_bytes
from hf_flash.config import AUTO, ReaderName
from hf_flash.config_arguments import ARGUMENTS, DIRECT, MMAP
from hf_flash.errors import ConfigError, UnsupportedModelError
from hf_flash.machine.free_memory import available_memory
from hf_flash.packing.flash_cache import cache_folder
from hf_flash.planning.budgets import UNLIMITED, budget_to_look_at, suggestion
from hf_flash.planning.measuring import Measured, measure
from hf_flash.planning.mixture import PlannedMixture, open_mixture, plan_mixture
from hf_flash.planning.mixture_report import ExpertOutlook as ExpertOutlook
from hf_flash.planning.model import PlannedModel, open_model
from hf_flash.planning.report import Plan as Plan  # importable from here, beside what returns it
from hf_flash.planning.report import Point
from hf_flash.reading.reader import READERS

SHARES: Final = (30, 40, 50, 60, 70, 80, 100)  # percent of the dense model that are looked at


def plan(
    model: str | os.PathLike[str],
    *,
    memory: int | str | None = None,
    predictor: str | None = None,
    dtype: str | None = None,
    disk: str | os.PathLike[str] | None = None,
    active: float | None = None,
    fresh: float | None = None,
    predicted: float | None = None,
    tokens: int | None = None,
    prompt_tokens: int = 16,
    reader: ReaderName = AUTO,
    **hub: Any,
) -> Plan | ExpertOutlook:
    """Predict how fast a model decodes on this machine, and how much memory it should have. Paper: sections 2 and 3.

    Needs config.json only; nothing is repacked, and of a Hub repository nothing else is downloaded. Takes some seconds.
    Of a mixture of experts, `predictor`, `active`, `fresh`, `predicted` and `tokens` have to be left out.

    Args:
        model: a repacked folder, a plain checkpoint, a folder with config.json alone, or the name of a Hub repository.
        memory: the budget to look at, a size or a share of the dense model such as `"50%"`. Default: most of what is free.
        predictor: `"quantized"`, `"lowrank"` or `"none"`. Default: the stored one, else as `FlashOffloadConfig` chooses.
        dtype: of compute, such as `"bfloat16"`. Default: the checkpoint's.
        disk: the folder whose disk is measured. Default: a repacked model's or a mixture's own, else that of the flash cache.
        active: share of a layer's neurons that a token leaves non-zero. Default: as calibrated, else 0.03.
        fresh: share of them that the 4 tokens before did not use. Default: as calibrated, else 0.24. Where one of these two is
            given, all layers are taken for alike and a calibration is left aside.
        predicted: neurons that the predictor names for one that is active. Default: as calibrated, else 1.5 or, low rank, 3.
        tokens: predict the mean of so many tokens after a prompt of `prompt_tokens`, while the windows fill. Default: the
            long run.
        prompt_tokens: see `tokens`.
        reader: as in `FlashOffloadConfig`; `"auto"` goes through the page cache where the whole store fits into free memory.
        hub: `revision`, `token`, `cache_dir`, `local_files_only`, as in `from_pretrained`.

    Returns:
        What to expect; of a mixture of experts an [`ExpertOutlook`].

    Raises:
        BudgetError: the budget is below the minimum; the message lists what takes it.
        ConfigError: an argument is out of range, or means nothing for this model.
        UnsupportedModelError: no family is known for this architecture.
        StoreError: no config.json, or a damaged store. DiskSpaceError, RepackError: no scratch file can be written.
    """
    if tokens is not None and (tokens < 1 or prompt_tokens < 1):
        raise ConfigError("no tokens", where="tokens, prompt_tokens", expected="at least 1", got=(tokens, prompt_tokens))
    found = _open(model, predictor, dtype, **hub)
    name, folder = found.folder.name if Path(model).is_dir() else str(model), _measured_folder(disk, found)
    if isinstance(found, PlannedMixture):
        _refuse(
            predictor=None if predictor == "none" else predictor, active=active, fresh=fresh, predicted=predicted, tokens=tokens
        )
        return plan_mixture(name, found, memory, folder, reader)
    demand = _demand(found, active, fresh, predicted, stored_report(found.store) if found.store else None)
    seen = None if tokens is None else (prompt_tokens, prompt_tokens + tokens - 1)
    return _plan_neurons(name, found, demand, memory, folder, seen, reader)


def _plan_neurons(
    name: str,
    found: PlannedModel,
    demand: Demand,
    memory: int | str | None,
    disk: Path,
    seen: tuple[int, int] | None,
    reader: ReaderName,
) -> Plan:
    """[`plan`] of a model whose tokens need neurons.

    Args:
        seen: tokens before those whose mean is predicted: of the first and of the last; `None`: the long run.
    """
    unlimited = _divide(found, UNLIMITED, demand, reader)
    whole = max(unlimited.dense_bytes, unlimited.minimum_bytes)  # buffers are more than the FFN of a tiny model
    wanted = _divide(found, budget_to_look_at(memory, unlimited.dense_bytes, whole), demand, reader)
    free = available_memory()
    times = measure(found, demand.selected, demand.predicted, wanted.capacity, disk, _reader(reader, found, wanted, free))
    sizes = {unlimited.dense_bytes * share // 100 for share in SHARES} | {wanted.minimum_bytes, wanted.budget_bytes}
    plans = [replace(wanted, budget_bytes=size) for size in sorted(sizes) if size >= wanted.minimum_bytes]
    points = [_predict(item, found, demand, times, seen) for item in plans]
    return Plan(
        model=name,
        model_type=found.family.model_type,
        dtype=str(found.dtype).removeprefix("torch."),
        predictor=found.predictor,
        memory=wanted,
        activity=demand,
        measured=times,
        point=next(point for point in points if point.budget_bytes == wanted.budget_bytes),
        points=tuple(points),
        free_bytes=free,
        dense_token_ms=wanted.layers * (times.stock_rest_ms + times.dense_ffn_ms) + times.stock_head_ms,
        suggested_bytes=suggestion(points, ceiling_bytes(None)),
        kv_cache_bytes_per_token=found.shape.kv_bytes(found.dtype.itemsize),
    )


def _open(
    source: str | os.PathLike[str], predictor: str | None, dtype: str | None, **hub: Any
) -> PlannedModel | PlannedMixture:
    """Find a model, of neurons or of experts."""
    try:
        return open_model(source, predictor, dtype, **hub)
    except UnsupportedModelError:
        mixture = open_mixture(source, dtype, **hub)
        if mixture is None:
            raise
        return mixture


def _refuse(**given: Any) -> None:
    """Refuse arguments of [`plan`] that mean nothing for a mixture of experts."""
    for name, value in given.items():
        if value is not None:
            raise ConfigError(
                "a mixture of experts has a router, which says what a token needs",
                where=name,
                expected="None, or 'none'" if name == "predictor" else "nothing: it is of models with a predictor",
                got=repr(value),
                hint="leave it out",
            )


def _reader(name: ReaderName, model: PlannedModel, memory: MemoryPlan, free: int) -> str:
    """`"mmap"` or `"direct"`, as `open_reader` will decide."""
    spare = free - memory.minimum_bytes - memory.window_bytes
    return DIRECT if READERS[name].wants_direct(sum(memory.widths) * model.unit.row_bytes, spare) else MMAP


def _measured_folder(disk: str | os.PathLike[str] | None, model: PlannedModel | PlannedMixture) -> Path:
    """The folder whose disk is measured; of one that will be made later, the nearest that exists already."""
    is_read_there = isinstance(model, PlannedMixture) or model.store is not None
    folder = Path(disk) if disk is not None else model.folder if is_read_there else cache_folder(None)
    if disk is not None and not folder.is_dir():
        raise ConfigError("not a folder", where="disk", got=str(folder))
    return next(part for part in [folder, *folder.absolute().parents] if part.is_dir())


# --- what a model needs ------------------------------------------------------------------------------------------------


def needs(
    source: str | os.PathLike[str],
    predictor: str | None = None,
    dtype: str | None = None,
    reader: ReaderName = AUTO,
    **hub: Any,
) -> MemoryPlan | ExpertPlan:
    """What a model holds in memory where it gets all it can use; its minimum. config.json is enough.

    Args:
        source, predictor, dtype, reader, hub: as in [`plan`].

    Raises:
        ConfigError, UnsupportedModelError, StoreError: as [`plan`].
    """
    found = _open(source, predictor, dtype, **hub)
    if isinstance(found, PlannedMixture):
        _refuse(predictor=None if predictor == "none" else predictor)
        return found.divide(UNLIMITED, reader)
    demand = expected_demand(found.fmt, found.shape, found.store) or everything(found.shape.widths)
    return _divide(found, UNLIMITED, demand, reader)


def _divide(found: PlannedModel, budget: int | str | None, demand: Demand, reader: ReaderName) -> MemoryPlan:
    """Divide a budget as loading does. Raises `BudgetError`."""
    model, _ = found.skeleton()
    weights = [*model.parameters(), *model.buffers()]
    resident = sum(w.nbytes for w in weights)
    need, threads = demand if found.fmt else None, ARGUMENTS["io_threads"].default
    sizes = found.fmt, found.shape, found.unit, found.dtype
    return divide_memory(budget, resident, *sizes, reader=reader, io_threads=threads, demand=need)


def _demand(
    model: PlannedModel, active: float | None, fresh: float | None, predicted: float | None, report: dict[str, Any] | None
) -> Demand:
    """What its tokens need: from what was given, else from a calibration, else from the paper."""
    for name, value, most in (("active", active, 1.0), ("fresh", fresh, 1.0), ("predicted", predicted, 1000.0)):
        if value is not None and not 0 < value <= most:
            raise ConfigError(f"{name} is out of range", where="plan", expected=f"more than 0, at most {most:g}", got=value)
    widths = model.shape.widths
    if model.fmt is None:
        return everything(widths)
    if report is not None and active is None and fresh is None:
        return measured(report["layers"], model.fmt.variant, model.predictor, widths, predicted)
    return supposed(widths, model.predictor, active, fresh, predicted)


# --- what comes of it --------------------------------------------------------------------------------------------------


def _predict(memory: MemoryPlan, model: PlannedModel, demand: Demand, found: Measured, seen: tuple[int, int] | None) -> Point:
    """The cost model, for one budget."""
    layers, missing = memory.layers, demand.misses(memory.capacities, seen)
    times = [found.at(count) for count in missing]
    return Point(
        budget_bytes=memory.budget_bytes,
        capacity=memory.capacity,
        hit_rate=1.0 - sum(missing) / layers / max(demand.selected, 1e-9),
        read_bytes=sum(missing) * model.unit.row_bytes,
        io_ms=sum(io for io, _ in times),
        manage_ms=sum(manage for _, manage in times),
        predict_ms=layers * found.predict_ms,
        compute_ms=layers * found.compute_ms,
        rest_ms=layers * found.rest_ms + found.head_ms,
    )
