"""base/folders.py: folders appear whole or not at all, one writer at a time, under names that fit."""

from __future__ import annotations

import logging
import os
import shutil
import threading
from collections import namedtuple
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_flash.base import folders
from hf_flash.base.folders import (
    MARK,
    check_room,
    clear_away,
    copy_small_files,
    lock_file,
    locked,
    partial_folder,
    path_beside,
    put_aside,
    scratch_file,
    scratch_folder,
    shorten_name,
)
from hf_flash.errors import DiskSpaceError, RepackError, TargetExistsError


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def fail(folder: Path, error: BaseException) -> None:
    """As a run that made a file and then met an error."""
    (folder / "done").write_text("x")
    raise error


# --- names ---------------------------------------------------------------------------------------------------------------

NAMES = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="/\0"), min_size=1, max_size=400)


@given(name=NAMES, most=st.integers(40, 240))
def test_a_name_that_fits_stays_and_a_long_one_fits_afterwards(name: str, most: int) -> None:
    short = shorten_name(name, most)
    assert len(os.fsencode(short)) <= most
    assert (short == name) == (len(os.fsencode(name)) <= most)
    assert shorten_name(short, most) == short


def test_long_names_stay_different() -> None:
    assert shorten_name("model--abc") == "model--abc"
    assert lock_file(Path("/a/b")).name == ".b.lock"
    long = [shorten_name(end * 300) for end in "ab"] + [shorten_name("a" * 299)]
    assert len(set(long)) == 3
    assert all(len(name) == 240 for name in long)


@given(name=NAMES.filter(lambda name: name not in (".", "..") and len(os.fsencode(name)) <= 255))
def test_what_lies_beside_a_target_is_hidden_and_has_a_name_that_file_systems_take(name: str) -> None:
    beside = path_beside(Path("/folder") / name, ".partial")
    assert beside.parent == Path("/folder")
    assert beside.name.startswith(".")
    assert len(os.fsencode(beside.name)) <= 255


# --- whole or not at all ---------------------------------------------------------------------------------------------------


def test_a_folder_appears_when_it_is_complete(tmp_path: Path) -> None:
    target = tmp_path / "target"
    with partial_folder(target, "source") as partial:
        (partial / "file").write_text("x")
        assert not target.exists()
    assert names(tmp_path) == ["target"]
    assert names(target) == ["file"]
    with pytest.raises(TargetExistsError), partial_folder(target):
        pass
    assert names(target) == ["file"]


@pytest.mark.parametrize(("belongs", "kept"), [("source", True), ("other", False), ("", False)])
def test_the_next_run_goes_on_where_the_last_one_ended_if_it_is_of_the_same(tmp_path: Path, belongs: str, kept: bool) -> None:
    target = tmp_path / "target"
    with pytest.raises(KeyboardInterrupt), partial_folder(target, "source") as partial:
        fail(partial, KeyboardInterrupt())
    assert not target.exists()
    with partial_folder(target, belongs) as partial:
        assert names(partial) == [MARK, *(["done"] if kept else [])]
    assert names(tmp_path) == ["target"]


def test_an_error_before_anything_was_finished_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RepackError), partial_folder(tmp_path / "target", "source"):
        raise RepackError("no")
    assert names(tmp_path) == []
    with pytest.raises(RepackError), partial_folder(tmp_path / "target", "source") as partial:
        fail(partial, RepackError("no"))
    assert names(tmp_path) == [".target.partial"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, RepackError])
def test_scratch_is_gone_whatever_happens(tmp_path: Path, error: type[BaseException]) -> None:
    with scratch_file(tmp_path, "test", 4, [b"ab", b"cd"]) as path:
        assert path.read_bytes() == b"abcd"
    with pytest.raises(error), scratch_folder(tmp_path, "test") as folder:
        fail(folder, error("no"))
    assert names(tmp_path) == []


def test_an_interrupt_while_scratch_is_removed_is_late_and_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remove, interrupts = shutil.rmtree, [KeyboardInterrupt("first"), KeyboardInterrupt("second")]

    def interrupted(path: Path) -> None:
        if interrupts:
            raise interrupts.pop(0)
        remove(path)

    monkeypatch.setattr(folders.shutil, "rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt), scratch_folder(tmp_path, "test"):
        pass
    assert names(tmp_path) == []


def test_a_folder_that_is_put_aside_is_gone_from_its_place(tmp_path: Path) -> None:
    for _ in range(2):  # the second finds what the first left
        (tmp_path / "entry").mkdir()
        (tmp_path / "entry" / "file").write_text("x")
        aside = put_aside(tmp_path / "entry")
        assert names(tmp_path) == [aside.name]
        assert names(aside) == ["file"]


def test_clearing_away_removes_a_link_and_not_what_it_leads_to(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    for name in ("link", "missing"):
        clear_away(tmp_path / name)
    assert names(tmp_path) == ["mine"]
    assert names(tmp_path / "mine") == ["file"]
    clear_away(tmp_path / "mine")
    assert names(tmp_path) == []


def test_weights_and_work_in_progress_are_not_copied(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    small = ["README.md", "generation_config.json", "tokenizer.json", "LICENSE", "chat_template.jinja"]
    large = ["x.safetensors", "X.BIN", "model.safetensors.index.json", "config.json", ".hidden", "a.tmp", "a.partial", "a.lock"]
    for name in small + large:
        (source / name).write_text(name)
    (source / "folder").mkdir()
    copy_small_files(source, target)
    assert names(target) == sorted(small)


# --- room and locks ----------------------------------------------------------------------------------------------------------


@given(free=st.integers(0, 1 << 40), needed=st.integers(0, 1 << 40))
def test_there_is_room_for_what_is_free(free: int, needed: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folders.shutil, "disk_usage", lambda folder: namedtuple("Usage", "free")(free))
        if needed <= free:
            check_room(Path("/folder"), needed)
        else:
            with pytest.raises(DiskSpaceError, match=f"{needed} bytes"):
                check_room(Path("/folder"), needed)


@pytest.mark.parametrize("keep", [True, False])
def test_the_second_writer_waits_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture, keep: bool) -> None:
    order: list[str] = []
    waits = threading.Event()

    class Told(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "waiting for it" in record.getMessage():
                waits.set()

    def second() -> None:
        with locked(tmp_path / "target", keep=keep):
            order.append("second")

    handler, logger = Told(), logging.getLogger("hf_flash")
    logger.addHandler(handler)
    try:
        with locked(tmp_path / "target", keep=keep):
            thread = threading.Thread(target=second)
            thread.start()
            assert waits.wait(30)
            order.append("first")
        thread.join(30)
    finally:
        logger.removeHandler(handler)
    assert order == ["first", "second"]
    assert names(tmp_path) == ([".target.lock"] if keep else [])
