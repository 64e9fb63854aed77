"""base/files.py: files that somebody else made are read with care, and ours appear whole or not at all (C7, C11)."""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_flash.base import files
from hf_flash.base.files import (
    DIGITS,
    TEXT_BYTES,
    StoredFile,
    check_inside,
    exists,
    is_plain_name,
    link_inside,
    list_folder,
    listed_files,
    parse_json,
    parse_number,
    read_at,
    read_json,
    write_json,
    write_text,
    writing,
)
from hf_flash.errors import DiskSpaceError, RepackError, StoreFormatError, StoreMissingError, StoreReadError

UNIX = pytest.mark.skipif(sys.platform == "win32", reason="FIFOs and devices")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("files")


# --- reading -------------------------------------------------------------------------------------------------------------


@given(data=st.binary(max_size=200), offset=st.integers(0, 220), size=st.integers(1, 64))
def test_blocks_are_the_bytes_of_the_file(folder: Path, data: bytes, offset: int, size: int) -> None:
    (folder / "data").write_bytes(data)
    with StoredFile(folder / "data") as file:
        assert file.nbytes == len(data)
        assert b"".join(bytes(block) for block in file.blocks(offset, size)) == data[offset:]
        assert file.read(len(data[offset:]), offset) == data[offset:]
        with pytest.raises(StoreReadError, match="ends too early"):
            file.read(len(data) + 1, 0)


@pytest.mark.parametrize("vectored", [True, False])
def test_one_read_fills_the_views_in_their_order(folder: Path, monkeypatch: pytest.MonkeyPatch, vectored: bool) -> None:
    if vectored and not hasattr(os, "preadv"):
        pytest.skip("no preadv here")
    if not vectored:
        monkeypatch.delattr(os, "preadv", raising=False)
    (folder / "views").write_bytes(bytes(range(100)))
    room = bytearray(60)
    fd = os.open(folder / "views", os.O_RDONLY)
    try:
        count = read_at(fd, [memoryview(room)[:20], memoryview(room)[20:]], 10)
        assert count == (60 if vectored else 20)
        assert bytes(room[:count]) == bytes(range(10, 10 + count))
        assert read_at(fd, [memoryview(room)], 100) == 0
    finally:
        os.close(fd)


@UNIX
@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", ["a folder", "a FIFO", "a device"])
def test_what_is_no_regular_file_is_refused_without_waiting(tmp_path: Path, kind: str) -> None:
    path = {"a folder": tmp_path, "a FIFO": tmp_path / "fifo", "a device": Path("/dev/zero")}[kind]
    if kind == "a FIFO":
        os.mkfifo(path)
    with pytest.raises(StoreFormatError, match=kind):
        StoredFile(path)


def test_not_there_and_not_now_are_different_errors(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    too_long = tmp_path / ("x" * 300)
    assert exists(tmp_path / "file")
    for path in (tmp_path / "missing", tmp_path / "file" / "below"):
        assert not exists(path)
        with pytest.raises(StoreMissingError):
            StoredFile(path)
    for call in (exists, StoredFile, list_folder):
        with pytest.raises(StoreReadError) as caught:
            call(too_long)
        assert caught.value.errno == errno.ENAMETOOLONG


def test_a_file_is_closed_with_its_last_reference(folder: Path) -> None:
    (folder / "closed").write_text("x")
    file = StoredFile(folder / "closed")
    fd = file._fd
    del file
    with pytest.raises(OSError, match=r"Bad file descriptor|file descriptor"):
        os.fstat(fd)


# --- text ----------------------------------------------------------------------------------------------------------------


@given(number=st.integers(0, 10**DIGITS - 1), zeros=st.integers(0, DIGITS))
def test_digits_are_a_number(number: int, zeros: int) -> None:
    text = "0" * min(zeros, DIGITS - len(str(number))) + str(number)
    assert parse_number(text) == number


@given(text=st.one_of(st.text(), st.none(), st.integers(), st.text("0123456789٣²", min_size=DIGITS - 2)))
def test_everything_else_is_none(text: object) -> None:
    plain = isinstance(text, str) and text.isascii() and text.isdigit() and len(text) <= DIGITS
    assert (parse_number(text) is not None) == plain


@pytest.mark.parametrize("text", [b"\xff", "{", "[" * 100_000, b"", "nul"])
def test_what_is_no_json_is_a_format_error(text: bytes | str) -> None:
    with pytest.raises(StoreFormatError, match="not a JSON file"):
        parse_json(text, "here")


def test_only_an_object_of_a_sensible_size_is_read(tmp_path: Path) -> None:
    (tmp_path / "list").write_text("[1]")
    with pytest.raises(StoreFormatError, match="not a JSON object"):
        read_json(tmp_path / "list")
    with open(tmp_path / "large", "wb") as file:
        file.truncate(TEXT_BYTES + 1)
    with pytest.raises(StoreFormatError, match="too large"):
        read_json(tmp_path / "large")


@given(value=st.dictionaries(st.text(), st.one_of(st.none(), st.booleans(), st.integers(), st.text(), st.lists(st.integers()))))
def test_what_is_written_is_read_again(folder: Path, value: dict[str, Any]) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # half a surrogate pair is no text
        return
    write_json(folder / "value.json", value)
    assert read_json(folder / "value.json") == value
    assert [path.name for path in folder.glob("value*")] == ["value.json"]


# --- names ---------------------------------------------------------------------------------------------------------------


@given(name=st.one_of(st.text(), st.lists(st.sampled_from(["a", "..", ".", "", "C:", "\\", "\0", "b.c"])).map("/".join)))
def test_a_plain_name_stays_in_its_folder(name: str) -> None:
    if is_plain_name(name):
        assert os.path.normpath(os.path.join("/folder", name)).startswith("/folder")
        assert "\\" not in name
        assert name == name.encode().decode()


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../x", "a/../../x", "C:x", "C:/x", "\\\\host\\x", "a\\..\\x", "a\0", "", 3, "\ud800"]
)
def test_a_name_that_may_lead_elsewhere_is_not_plain(name: object) -> None:
    assert not is_plain_name(name)


@UNIX
def test_links_may_lead_to_files_of_the_folder_and_to_the_hubs_blobs(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--me--x" / "snapshots" / "0123456", tmp_path / "models--me--x" / "blobs"
    for made in (snapshot, blobs, tmp_path / "plain"):
        made.mkdir(parents=True)
    for file in (blobs / "hash", tmp_path / "plain" / "file", tmp_path / "secret"):
        file.write_text("x")
    for link, target in ((snapshot / "a", blobs / "hash"), (tmp_path / "plain" / "a", tmp_path / "plain" / "file")):
        link.symlink_to(target)
        check_inside(link.parent, [link])
    for parent in (snapshot, tmp_path / "plain"):
        (parent / "out").symlink_to(tmp_path / "secret")
        with pytest.raises(StoreFormatError, match="outside its folder"):
            check_inside(parent, [parent / "out"])
    link_inside(tmp_path / "secret", snapshot / "ours")
    check_inside(snapshot, [snapshot / "ours"])


@pytest.mark.parametrize(
    "listed", [{}, {"weight_map": {}}, {"weight_map": []}, {"weight_map": {"a": 3}}, {"weight_map": {"a": "x.bin"}}]
)
def test_an_index_lists_files_of_its_kind_or_is_refused(tmp_path: Path, listed: dict[str, Any]) -> None:
    index = tmp_path / "model.safetensors.index.json"
    write_json(index, listed)
    with pytest.raises(StoreFormatError, match="index"):
        listed_files(index)
    write_json(index, {"weight_map": {"a": "x.safetensors", "b": "x.safetensors"}})
    assert listed_files(index) == [tmp_path / "x.safetensors"]


# --- writing -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "kind"), [(errno.ENOSPC, DiskSpaceError), (errno.EDQUOT, DiskSpaceError), (errno.EIO, RepackError)]
)
def test_a_file_that_cannot_be_written_is_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[RepackError]
) -> None:
    path = tmp_path / "file"
    write_text(path, "old")

    def fail(fd: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files.os, "fsync", fail)
    with pytest.raises(kind) as caught:
        write_text(path, "new")
    assert caught.value.errno == number
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EROFS, errno.ENOSYS])
def test_a_file_system_without_fsync_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def fail(fd: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files.os, "fsync", fail)
    write_text(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "new"


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, lambda: StoreFormatError("ours")])
def test_errors_of_others_pass_and_leave_nothing_half_written(tmp_path: Path, error: Callable[[], BaseException]) -> None:
    raised = error()

    def write() -> None:
        (tmp_path / "file.tmp").write_text("half")
        raise raised

    with pytest.raises(type(raised)) as caught, writing(tmp_path / "file"):
        write()
    assert caught.value is raised
    assert os.listdir(tmp_path) == []
