"""The live view of `hf-flash demo --watch`: a picture of the windows that shows what every token read and reused.

Every layer is a strip of its neurons in the order of their ids, as many lines high as the terminal has room for. A character
holds two pixels, one above the other, and a pixel stands for one or more neurons. Neurons in DRAM glow according to how lately
they were used: the neurons of a token light up, fade while the window moves on, and go dark when others take their slots.

Where stdout is not a terminal, or one without colours, or `NO_COLOR` is set, each token is a line of text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from rich.console import Console, Group
from rich.live import Live
from rich.style import Style
from rich.text import Text

from hf_flash.base.sizes import format_bytes
from hf_flash.runtime.counters import FlashStats
from hf_flash.runtime.observing import LayerSeen, TokenSeen

Floats = npt.NDArray[np.float64]
RGB = tuple[int, int, int]

_FLASH: Final[RGB] = (24, 26, 36)
_DRAM: Final[RGB] = (52, 66, 122)  # not grey where there are only 256 colours
_LATELY: Final[RGB] = (38, 134, 148)
_REUSED: Final[RGB] = (126, 224, 129)
_READ: Final[RGB] = (255, 168, 38)
_LEGEND: Final = (("read now", _READ), ("reused", _REUSED), ("used lately", _LATELY), ("in DRAM", _DRAM), ("on flash", _FLASH))
_BARS: Final = " ▁▂▃▄▅▆▇█"
_LEFT, _RIGHT = 6, 22  # columns beside the strips
_AROUND: Final = 16  # lines that are not strips
_FADING_TOKENS: Final = 5  # that an expert is shown as used lately


class LiveView:
    """A picture that every token replaces. Use it as a context, and call it with each token.

    Args:
        console: a terminal with colours.
        about: what is shown, in a line.
        found: of the model, for its sizes.
        decode: token ids to text.
        prompt: the text that was given.
        total: tokens that will come.
    """

    def __init__(
        self, console: Console, about: str, found: FlashStats, decode: Callable[[list[int]], str], prompt: str, total: int
    ) -> None:
        self._console, self._about, self._found, self._decode = console, about, found, decode
        self._prompt, self._total = prompt, total
        self._tokens: list[TokenSeen] = []
        self._usual = np.zeros(3)  # neurons of a kind in a pixel
        self._live = Live(console=console, auto_refresh=False, vertical_overflow="crop")

    def __enter__(self) -> LiveView:
        self._live.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._live.__exit__(*error)

    def __call__(self, token: TokenSeen) -> None:
        self._tokens.append(token)
        self._live.update(self.picture(), refresh=True)

    def picture(self) -> Group:
        """What the terminal shows after the last token."""
        width, height = self._console.size
        wide = max(16, width - _LEFT - _RIGHT)
        return Group(
            Text(self._about, style="bold", no_wrap=True, overflow="ellipsis"), self._sizes(), Text(), _legend(),
            _heading(wide), *self._strips(self._tokens[-1].layers, wide, height - _AROUND), *self._history(wide),
            Text(), self._text(width),
        )  # fmt: skip

    def _sizes(self) -> Text:
        found = self._found
        return Text(
            f"{format_bytes(found.dense_bytes)} of weights in {format_bytes(found.budget_bytes)}: {found.what_fits}",
            style="dim", no_wrap=True, overflow="ellipsis",
        )  # fmt: skip

    def _strips(self, layers: Sequence[LayerSeen], wide: int, room: int) -> list[Text]:
        """Every layer's strip with its figures, up to four lines high; where there is little room, layers share a line."""
        lines, pixels = max(1, min(4, room // len(layers) - 1)), 2 * wide
        apart = len(layers) * (lines + 1) <= room
        groups = [g.tolist() for g in np.array_split(np.arange(len(layers)), min(len(layers), max(1, room)))]
        each = [_pixels(layer, lines * pixels, getattr(self._found, "window", _FADING_TOKENS)) for layer in layers]
        counts = [np.sum([each[at] for at in group], axis=0) for group in groups]
        self._usual = np.maximum(0.8 * self._usual, np.mean([count[:3].mean(1) for count in counts], 0))
        made = []
        for group, count in zip(groups, counts, strict=True):
            colours = _colours(count, np.maximum(self._usual, 0.4)).reshape(lines, 2, wide, 3)
            for line, (top, bottom) in enumerate(colours):
                name = f"{group[0]}-{group[-1]}" if len(group) > 1 else f"{group[0]}"
                text = Text(no_wrap=True).append(f"{'' if line else name:>{_LEFT - 1}} ", style="dim")
                _paint(text, top, bottom)
                made.append(text if line else text.append_text(_figures([layers[at] for at in group])))
            made += [Text()] if apart else []
        return made

    def _history(self, wide: int) -> list[Text]:
        """The token's figures, and how they came to be since the prompt."""
        token, decoded = self._tokens[-1], self._tokens[1:][-wide:]
        said = f"token {token.number} of {self._total - 1}" if token.number else f"the prompt, {token.tokens} tokens"
        took = (
            f"{format_bytes(token.read_bytes)} in {token.reads} reads",
            f"{token.hit_rate:.0%} was in DRAM",
            f"{token.ms:.1f} ms",
        )
        first = Text(" " * _LEFT).append(said, style="bold").append("".join(f"    {part}" for part in took))
        read, hits = [seen.read_bytes for seen in decoded], [seen.hit_rate for seen in decoded]
        return [
            Text(), first, Text(),
            *_bars(read, max(read, default=0), _READ, f"read, to {format_bytes(max(read, default=0))}", wide),
            *_bars(hits, 1.0, _REUSED, "was in DRAM, to 100%", wide),
        ]  # fmt: skip

    def _text(self, width: int) -> Text:
        """The end of what was generated, the last token marked."""
        ids = [seen.token for seen in self._tokens]
        before, whole = self._decode(ids[:-1]), self._decode(ids)
        last = whole[len(before) :] if whole.startswith(before) else ""
        room = 3 * width - 8 - len(last)
        before = (self._prompt + before)[-room:]
        return Text(before, overflow="fold").append(last, style="black on #ffa826")


class PlainView:
    """A line for every token, for files and pipes."""

    def __init__(self, say: Callable[[str], None], decode: Callable[[list[int]], str]) -> None:
        self._say, self._decode = say, decode

    def __enter__(self) -> PlainView:
        self._say(f"{'token':<7} {'text':<14} {'read':>10} {'reads':>6} {'hits':>5} {'ms':>8}")
        return self

    def __exit__(self, *error: Any) -> None:
        self._say("")

    def __call__(self, token: TokenSeen) -> None:
        number, text = token.number or "prompt", repr(self._decode([token.token]))
        read = f"{format_bytes(token.read_bytes):>10} {token.reads:>6}"
        self._say(f"{number:<7} {text:<14} {read} {token.hit_rate:>5.0%} {token.ms:>8.1f}")


def view(console: Console, say: Callable[[str], None], **about: Any) -> LiveView | PlainView:
    """The view that this terminal can show."""
    if console.is_terminal and console.color_system is not None and not (console.no_color or console.is_dumb_terminal):
        return LiveView(console, **about)
    return PlainView(say, about["decode"])


# --- pixels ------------------------------------------------------------------------------------------------------------


def _pixels(layer: LayerSeen, count: int, window: int) -> Floats:
    """[5, count]: neurons in each pixel that were read, reused, used lately (fading), are in DRAM; and all."""
    fading = np.where(layer.resident & (layer.age > 0), np.clip(1 - layer.age / window, 0, 1), 0.0)
    kinds = np.stack([layer.read, layer.reused, fading, layer.resident, np.ones_like(fading)]).astype(float)
    edges = np.linspace(0, kinds.shape[1], count + 1).astype(int)[:-1]
    if count > kinds.shape[1]:  # a neuron is several pixels
        return kinds[:, edges]
    found: Floats = np.add.reduceat(kinds, edges, axis=1)
    return found


def _colours(counts: Floats, usual: Floats) -> npt.NDArray[np.uint8]:
    """[pixels, 3]: one lamp over the other. A lamp is bright where there are more of its neurons than usual, or any at all."""
    read, reused, lately = 1 - np.exp(-counts[:3] / usual[:, None])
    colour = np.broadcast_to(np.array(_FLASH, float), (counts.shape[1], 3))
    for lamp, light in ((_DRAM, counts[3] / counts[4]), (_LATELY, lately), (_REUSED, reused), (_READ, read)):
        colour = colour + light[:, None] * (np.array(lamp, float) - colour)
    return np.asarray(np.round(colour / 6) * 6).clip(0, 255).astype(np.uint8)  # fewer shades: longer runs, fewer bytes


@lru_cache(maxsize=4096)
def _style(top: RGB, bottom: RGB) -> Style:
    return Style(color="#{:02x}{:02x}{:02x}".format(*top), bgcolor="#{:02x}{:02x}{:02x}".format(*bottom))


def _paint(text: Text, top: Any, bottom: Any) -> None:
    """Two rows of pixels as a line of half blocks."""
    both = list(zip(map(tuple, top.tolist()), map(tuple, bottom.tolist()), strict=True))
    start = 0
    for at in range(1, len(both) + 1):
        if at == len(both) or both[at] != both[start]:
            text.append("▀" * (at - start), _style(*both[start]))
            start = at


def _figures(layers: Sequence[LayerSeen]) -> Text:
    read, reused = (sum(int(getattr(layer, kind).sum()) for layer in layers) for kind in ("read", "reused"))
    hits = f"{reused / (read + reused):>6.0%}" if read + reused else f"{'-':>6}"
    return Text().append(f"{read:>7}", style=_rgb(_READ)).append(f"{reused:>8}", style=_rgb(_REUSED)).append(hits, style="dim")


def _heading(wide: int) -> Text:
    return Text(f"{'layer':<{_LEFT + wide}}{'read':>7}{'reused':>8}{'hits':>6}", style="dim", no_wrap=True)


def _legend() -> Text:
    text = Text(" " * _LEFT, no_wrap=True)
    for name, colour in _LEGEND:
        text.append("██ ", style=_rgb(colour)).append(f"{name}   ")
    return text


def _bars(values: Sequence[float], most: float, colour: RGB, label: str, wide: int) -> list[Text]:
    """A bar for every value, two lines high."""
    steps = len(_BARS) - 1
    heights = [round(value / most * 2 * steps) if most else 0 for value in values]
    rows = ["".join(_BARS[min(steps, max(0, height - floor))] for height in heights) for floor in (steps, 0)]
    texts = [Text(" " * _LEFT, no_wrap=True).append(f"{row:<{wide}}", style=_rgb(colour)) for row in rows]
    texts[-1].append(f"  {label}", style="dim")
    return texts


def _rgb(colour: RGB) -> str:
    return "rgb({},{},{})".format(*colour)
