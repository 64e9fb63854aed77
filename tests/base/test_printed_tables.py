"""What commands print fits the terminal, and is whole in a file."""

from __future__ import annotations

import io
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from hf_flash.base.tables import Figures, Paragraph, facts, items, printed, printing, section

WORD = st.text(st.characters(codec="ascii", categories=("L", "N")), min_size=1, max_size=8)
NAME = st.lists(WORD, min_size=1, max_size=6).map(" ".join)


@st.composite
def tables(draw: st.DrawFn) -> Figures:
    columns = draw(st.integers(1, 12))
    rows = draw(st.lists(st.tuples(NAME, *[WORD] * columns), min_size=1, max_size=4))
    return Figures(["name", *draw(st.lists(WORD, min_size=columns, max_size=columns))], rows, chosen=0)


@given(tables(), st.integers(20, 120))
def test_a_table_shows_every_cell_in_any_width(table: Figures, width: int) -> None:
    lines = printed(table, width).splitlines()
    assert max(map(cell_len, lines)) <= width
    shown = " ".join(lines).split()
    for name, *cells in table.rows:
        assert all(word in shown for word in [*name.split(), *cells])
    whole = printed(table).splitlines()
    assert len(whole) == 2 + len(table.rows)  # nothing is wrapped in a file
    assert whole[0].split() == list(table.headings)


@given(st.lists(NAME, min_size=1, max_size=5), st.integers(20, 60))
def test_paragraphs_and_lists_are_wrapped_between_words(texts: list[str], width: int) -> None:
    for made in (items(texts), facts([(text[:8], text) for text in texts]), section("A title", *map(Paragraph, texts))):
        lines = printed(made, width).splitlines()
        assert max(map(cell_len, lines)) <= width
        assert all(word in " ".join(lines).split() for text in texts for word in text.split())


def test_what_is_longer_than_a_line_stays_in_one_piece_and_brackets_are_text() -> None:
    path = "/a/" + "very-long/" * 12 + "model[bold]"
    assert path in printed(Paragraph(f"see {path}"), 40)
    assert "[red]" in printed(Figures(["a"], [["[red]x"]]))


def test_a_pipe_has_no_width_and_a_reader_that_is_gone_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert printing().width > 1000
    monkeypatch.setenv("COLUMNS", "60")
    assert printing().width == 60
    monkeypatch.setattr(sys, "stdout", Gone())
    with pytest.raises(BrokenPipeError):
        printing().print("x")
