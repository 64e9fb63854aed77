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
    host_hits: int = 0  # those that were not on the device that computes, and in this machine's memory
    bus_bytes: int = 0  # copied between the two
    missing_bytes: int = 0  # bundles that were missing, times their size on flash
    read_bytes: int = 0  # what was asked of the disk: missing_bytes plus page and sector rounding
    reads: int = 0  # chunks: contiguous requests to the disk
    ahead: int = 0  # neurons read before the forward that may need them: by lookahead, or behind the layer before
    ahead_used: int = 0  # of these, computed by the forward they were read for
    predict_s: float = 0.0
    manage_s: float = 0.0
    io_s: float = 0.0
    compute_s: float = 0.0

    def add_read(self, read: ReadCount) -> None:
        """Count what a read cost."""
        self.read_bytes += read.nbytes
        self.reads += read.chunks
        self.host_hits += read.host_hits
        self.bus_bytes += read.bus_bytes

    def reset(self) -> None:
        for item in fields(self):
            setattr(self, item.name, item.default)


@dataclass(frozen=True, kw_only=True)
class FlashStats:
    """A snapshot, as [`hf_flash.stats`] returns it. Sizes in bytes, times in seconds.

    [`NeuronStats`] and [`ExpertStats`] add what is particular to a kind of model. Rates are per token that went through the
    model, prompts and padding included; use `reset` to look at decoding alone. `read_bytes` is what readers asked for; under
    mmap the page cache may have had it already.
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
    process_bytes: int  # what the whole process has in memory: weights, interpreter, libraries, activations, KV cache
    kv_cache_bytes_per_token: int  # per sequence; comes on top of the budget
    device: str = "cpu"  # where all of this is, and layers compute
    beside_device: str | None = None  # where the rest is, if that is another device: `units_on="cpu"`
    beside_bytes: int = 0
    host_bytes: int = 0  # what is in this machine's memory beside it, where that is a GPU: buffers, and units
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
        """What a neuron, or an expert, takes in a window, on average."""
        raise NotImplementedError

    @property
    def what_fits(self) -> str:
        """What the window has room for, for people."""
        raise NotImplementedError

    def _rows(self) -> list[tuple[str, str]]:
        """What is particular to a kind of model, for people: a name and a text each."""
        return []

    def _host_rows(self) -> list[tuple[str, str]]:
        """What a device has of this machine's memory, for people."""
        if self.device == "cpu":
            return [(f"on {self.beside_device}", format_bytes(self.beside_bytes))] if self.beside_device else []
        c, copied = self.counters, format_bytes(self.counters.bus_bytes / max(1, self.tokens))
        found = f"{c.host_hits / max(1, c.selected):.1%} of what is used is found there"
        return [("weights in DRAM", f"{format_bytes(self.host_bytes)}; {found}; {copied} copied per token")]

    def __str__(self) -> str:
        c, tokens, kv = self.counters, max(1, self.tokens), self.kv_cache_bytes_per_token
        per_token = {name: 1e3 * getattr(c, name + "_s") / tokens for name in ("predict", "manage", "io", "compute")}
        rows = [
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
        return "\n".join(f"{name:<20}{value}" for name, value in rows)


@dataclass(frozen=True, kw_only=True)
class NeuronStats(FlashStats):
    """Of a model whose feed-forward layers are neurons on flash."""

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
    """Of a mixture of experts."""

    experts: int  # of a layer
    experts_per_token: int
    resident_experts: tuple[int, ...]  # in memory now, of each layer
    all_experts: int  # of all layers
    experts_bytes: int  # of all experts, as they lie in the files

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
