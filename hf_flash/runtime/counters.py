"""What a flash model did and holds: counters, bytes and milliseconds."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any

from hf_flash.base.sizes import format_bytes
from hf_flash.reading.reader import ReadCount


@dataclass
class Counters:
    """Running totals over all FFN layers since loading, or since the last reset."""

    calls: int = 0  # forwards of one FFN layer
    tokens: int = 0  # tokens through one FFN layer, summed over the layers
    selected: int = 0  # neurons computed, union over the tokens of a call
    hits: int = 0  # of these, already in the window
    host_hits: int = 0  # with a device: of these, not there but in this machine's memory
    bus_bytes: int = 0  # copied between device and host memory
    missing_bytes: int = 0  # bundles that were missing, times their size on flash
    read_bytes: int = 0  # requested from the disk: missing_bytes plus page and sector rounding
    reads: int = 0  # chunks: contiguous requests to the disk
    ahead: int = 0  # neurons read before the forward that may need them: by lookahead, or after the previous layer's call
    ahead_used: int = 0  # of these, computed by the forward they were read for
    predict_s: float = 0.0
    manage_s: float = 0.0
    io_s: float = 0.0
    compute_s: float = 0.0

    def add_read(self, read: ReadCount) -> None:
        """Add the bytes, chunks and hits of one read."""
        self.read_bytes += read.nbytes
        self.reads += read.chunks
        self.host_hits += read.host_hits
        self.bus_bytes += read.bus_bytes

    def reset(self) -> None:
        for item in fields(self):
            setattr(self, item.name, item.default)


@dataclass(frozen=True, kw_only=True)
class FlashStats:
    """A snapshot of the counters and the memory, as [`hf_flash.stats`] returns it. Sizes in bytes, times in seconds.

    [`NeuronStats`] and [`ExpertStats`] add the fields of one kind of model. Rates are per token that went through the model,
    prompts and padding included; use `reset` to look at decoding alone. `read_bytes` is what readers requested; under mmap the
    page cache may have had it already.
    """

    layers: int  # with weights on flash
    capacity: int  # neurons, or experts, that a layer's window can hold, on average
    reader: str
    reads_with: str  # io_uring, threads or the page cache
    budget_bytes: int
    minimum_bytes: int
    resident_bytes: int  # embeddings, attention, norms, biases, routers
    scratch_bytes: int
    window_bytes: int
    dense_bytes: int  # what the stock model would hold
    process_bytes: int  # resident memory of the whole process: weights, interpreter, libraries, activations, KV cache
    kv_cache_bytes_per_token: int  # per sequence; comes on top of the budget
    device: str = "cpu"  # where all of this is, and layers compute
    beside_device: str | None = None  # with `units_on="cpu"`: the device that holds everything that is not a unit
    beside_bytes: int = 0  # what is there
    host_bytes: int = 0  # if `device` is a GPU: buffers and units in this machine's memory
    predictor_bytes: int = 0
    counters: Counters = field(default_factory=Counters)

    @property
    def dram_bytes(self) -> int:
        """All weight bytes held now, in DRAM or on the device; never more than `budget_bytes`."""
        return self.resident_bytes + self.predictor_bytes + self.scratch_bytes + self.window_bytes

    @property
    def tokens(self) -> int:
        """Tokens that went through the model."""
        return self.counters.tokens // self.layers

    @property
    def hit_rate(self) -> float:
        """Share of the computed neurons, or experts, that were already in DRAM."""
        return self.counters.hits / max(1, self.counters.selected)

    @property
    def read_bytes_per_token(self) -> float:
        return self.counters.read_bytes / max(1, self.tokens)

    @property
    def read_gb_per_s(self) -> float:
        return self.counters.read_bytes / 1e9 / self.counters.io_s if self.counters.io_s else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain values, derived ones included, for JSON."""
        derived = ("dram_bytes", "tokens", "hit_rate", "read_bytes_per_token", "read_gb_per_s")
        return asdict(self) | {name: getattr(self, name) for name in derived}

    @property
    def unit_bytes(self) -> float:
        """Average size of a neuron or an expert."""
        raise NotImplementedError

    @property
    def what_fits(self) -> str:
        """A phrase that says how many units a layer's window has room for."""
        raise NotImplementedError

    def _rows(self) -> list[tuple[str, str]]:
        """The rows of one kind of model for `print`, a label and a text each."""
        return []

    def _host_rows(self) -> list[tuple[str, str]]:
        """The rows about memory other than `device`'s for `print`, a label and a text each."""
        if self.device == "cpu":
            return [(f"on {self.beside_device}", format_bytes(self.beside_bytes))] if self.beside_device else []
        c, copied = self.counters, format_bytes(self.counters.bus_bytes / max(1, self.tokens))
        found = f"{c.host_hits / max(1, c.selected):.1%} of what is used is found there"
        return [("weights in DRAM", f"{format_bytes(self.host_bytes)}; {found}; {copied} copied per token")]

    def __str__(self) -> str:
        return "\n".join(f"{name:<20}{value}" for name, value in self.rows())

    def rows(self) -> list[tuple[str, str]]:
        """What people read: names and values."""
        c, tokens, kv = self.counters, max(1, self.tokens), self.kv_cache_bytes_per_token
        per_token = {name: 1e3 * getattr(c, name + "_s") / tokens for name in ("predict", "manage", "io", "compute")}
        return [
            ("tokens", f"{self.tokens}"),
            ("read per token", f"{format_bytes(self.read_bytes_per_token)} in {c.reads / tokens:.1f} reads"),
            *self._rows(),
            (
                "weights in DRAM" if self.device == "cpu" else f"weights on {self.device}",
                f"{format_bytes(self.dram_bytes)} of a budget of {format_bytes(self.budget_bytes)}",
            ),
            *self._host_rows(),
            ("the dense model", format_bytes(self.dense_bytes)),
            (
                "whole process",
                f"{format_bytes(self.process_bytes)}; KV cache {format_bytes(kv)} a token",
            ),
            ("FFN ms per token", ", ".join(f"{name} {ms:.2f}" for name, ms in per_token.items())),
        ]


@dataclass(frozen=True, kw_only=True)
class NeuronStats(FlashStats):
    """The snapshot of a model whose feed-forward layers are neurons on flash."""

    d_ff: int  # neurons of a layer, of the widest where they differ
    neurons: int  # of all layers
    window: int  # tokens
    predictor: str

    @property
    def unit_bytes(self) -> float:
        return (self.dense_bytes - self.resident_bytes) / self.neurons

    @property
    def what_fits(self) -> str:
        room = f"room for {self.capacity} of {self.d_ff} neurons a layer"
        return f"{room}; a window of {self.window} tokens; predictor {self.predictor}"

    def _rows(self) -> list[tuple[str, str]]:
        c = self.counters
        window = f"{self.hit_rate:.1%} (window of {self.window} tokens, {self.capacity} neurons a layer)"
        computed = f"{self.layers * c.selected / max(1, c.calls) / self.neurons:.1%} of each layer, per call"
        return [
            ("window hit rate", window),
            ("neurons computed", computed),
            ("predictor, reader", f"{self.predictor}, {self.reader} ({self.reads_with})"),
        ]


@dataclass(frozen=True, kw_only=True)
class ExpertStats(FlashStats):
    """The snapshot of a mixture of experts."""

    experts: int  # of a layer; of the largest where they differ
    experts_per_token: int
    resident_experts: tuple[int, ...]  # in memory now, of each layer
    all_experts: int  # of all layers
    experts_bytes: int  # of all experts, as stored in the files

    @property
    def unit_bytes(self) -> float:
        return self.experts_bytes / self.all_experts

    @property
    def what_fits(self) -> str:
        return f"room for {self.capacity} of {self.experts} experts a layer; a token uses {self.experts_per_token}"

    def _rows(self) -> list[tuple[str, str]]:
        c = self.counters
        missed = (c.selected - c.hits) / max(1, c.calls)
        return [
            ("expert hit rate", f"{self.hit_rate:.1%} ({self.capacity} of {self.experts} experts a layer in memory)"),
            ("experts a call", f"{c.selected / max(1, c.calls):.1f} in each layer, {missed:.1f} of them read"),
            ("reader", f"{self.reader} ({self.reads_with})"),
        ]
