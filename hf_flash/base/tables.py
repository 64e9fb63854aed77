"""What the commands print: tables of figures, lists of facts and paragraphs that fit the terminal. Made with rich.

On a terminal that is too narrow for a table, each of its rows becomes a short list. In a file or a pipe, which have no width,
nothing is wrapped. Colours follow the terminal and `NO_COLOR`.
"""

from __future__ import annotations

import io
import os
import sys
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.columns import Columns
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

_UNBOUNDED: Final = 10_000  # columns of a file or a pipe
_BETWEEN: Final = 3  # columns between two of a table


@dataclass(frozen=True)
class Figures:
    """A table. Its first column names the rows and may be wrapped; the others are aligned to the right and never are.

    Attributes:
        headings: one for each column, with the unit.
        rows: as many cells each.
        chosen: the number of a row to stress.
        notes: columns, by number, that hold words: they are aligned to the left and may be wrapped.
    """

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    chosen: int | None = None
    notes: frozenset[int] = frozenset()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self._least_width() <= options.max_width:
            yield self._table()
            return
        for number, (name, *cells) in enumerate(self.rows):
            yield Text(name, style="bold" if number == self.chosen else "underline")
            pairs = zip(self.headings[1:], cells, strict=True)
            yield Padding(Columns([_pair(heading, cell) for heading, cell in pairs if cell], padding=(0, 3)), (0, 0, 0, 2))

    def _least_width(self) -> int:
        """Columns of the terminal that the table needs, with names and words wrapped as far as they can be."""
        columns = enumerate(zip(self.headings, *self.rows, strict=True))
        cells = (" ".join(column).split() if self._is_words(number) else column for number, column in columns)
        return sum(max(map(cell_len, column), default=0) for column in cells) + _BETWEEN * (len(self.headings) - 1)

    def _is_words(self, number: int) -> bool:
        return number == 0 or number in self.notes

    def _table(self) -> Table:
        table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="bold")
        for number, heading in enumerate(self.headings):
            words = self._is_words(number)
            table.add_column(Text(heading), justify="left" if words else "right", no_wrap=not words)
        for number, row in enumerate(self.rows):
            table.add_row(*map(Text, row), style="bold" if number == self.chosen else None)
        return table


def _pair(heading: str, cell: str) -> Text:
    return Text.assemble((f"{heading} ", "dim"), cell)


def facts(pairs: Iterable[tuple[str, str]]) -> Table:
    """Names and what there is to say of each, a pair a line."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in pairs:
        grid.add_row(Text(name), Text(value))
    return grid


@dataclass(frozen=True)
class Paragraph:
    """Text that is wrapped between words. A path or a command that is longer than a line stays in one piece."""

    text: str
    style: str = ""
    mark: str = ""  # before its first line

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        after = " " * len(self.mark)
        for number, line in enumerate(self.text.splitlines() or [""]):
            first = after if number else self.mark
            wrapped = textwrap.wrap(line, options.max_width, initial_indent=first, subsequent_indent=after,
                                    break_long_words=False, break_on_hyphens=False)  # fmt: skip
            for row in wrapped or [""]:
                yield Text(row, style=self.style, no_wrap=True, overflow="ignore")


def items(texts: Iterable[str]) -> Group:
    """Paragraphs as a list."""
    return Group(*(Paragraph(text, mark="- ") for text in texts))


def section(title: str, *parts: RenderableType) -> Group:
    """Parts under a title, an empty line before it."""
    return Group(Text(), Text(title, style="bold"), *parts)


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Let the caller know, instead of ending the process with 1."""
        raise BrokenPipeError


def printing(stderr: bool = False) -> Console:
    """A console for what people read. Printing to it raises `BrokenPipeError` if the reader is gone."""
    stream = sys.stderr if stderr else sys.stdout
    has_width = "COLUMNS" in os.environ or (stream is not None and stream.isatty())
    return _Console(stderr=stderr, highlight=False, markup=False, emoji=False, width=None if has_width else _UNBOUNDED)


def printed(renderable: RenderableType, width: int = _UNBOUNDED) -> str:
    """What is printed, without colours, in so many columns."""
    stream = io.StringIO()
    Console(file=stream, width=width, highlight=False, markup=False, emoji=False).print(renderable, crop=False)
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines())
