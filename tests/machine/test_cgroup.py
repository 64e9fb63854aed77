"""What the cgroups of this process allow: made-up trees of files, and real groups where this system lets us make them."""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_flash.machine import cgroup
from hf_flash.machine.about import usable_cores
from hf_flash.machine.free_memory import available_memory
from hf_flash.machine.memory_cap import memory_cap
from tests.conftest import in_a_fork

GIB = 1 << 30
UNLIMITED = 9223372036854771712
V1 = "30 23 0:26 {begin} {place} rw,relatime shared:9 - cgroup cgroup rw,{controllers}\n"
V2 = "31 23 0:27 {begin} {place} rw - cgroup2 cgroup2 rw,nsdelegate\n"
NOISE = "22 1 259:1 / / rw - ext4 /dev/root rw\n24 22 0:5 / /proc rw - proc proc rw\nnot a mount\n\n"


class Tree:
    """A file system with groups. `place` is where a hierarchy is mounted."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "proc" / "self").mkdir(parents=True)
        self.own("")
        self.mounts(NOISE)

    def own(self, text: str) -> None:
        (self.root / "proc/self/cgroup").write_text(text)

    def mounts(self, *rows: str) -> None:
        (self.root / "proc/self/mountinfo").write_text("".join(rows))

    def v1(self, controllers: str, place: str, begin: str = "/") -> str:
        return V1.format(controllers=controllers, place=place, begin=begin)

    def v2(self, place: str, begin: str = "/") -> str:
        return V2.format(place=place, begin=begin)

    def write(self, folder: str, **files: object) -> None:
        """Files of a group; `memory_max=1` is `memory.max`, and lists are the rows of a `memory.stat`."""
        (self.root / folder).mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (self.root / folder / name.replace("_", ".", 1)).write_text(f"{text}\n")

    def left(self) -> list[int]:
        return list(cgroup.memory_left(self.root))


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


def v1_group(limit: object, usage: object, stat: str = "") -> dict[str, object]:
    return {"memory_limit_in_bytes": limit, "memory_usage_in_bytes": usage, "memory_stat": stat}


def v2_group(limit: object, usage: object, stat: str = "") -> dict[str, object]:
    return {"memory_max": limit, "memory_current": usage, "memory_stat": stat}


# --- memory --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("prefix", "dirty", "make"), [
    ("", ("file_dirty", "file_writeback"), v2_group), ("total_", ("total_dirty", "total_writeback"), v1_group),
])  # fmt: skip
def test_page_cache_is_free_however_often_it_was_read(
    tree: Tree, prefix: str, dirty: tuple[str, str], make: Callable[..., dict[str, object]]
) -> None:
    """The kernel takes both lists back, but not what is locked, what lies in a tmpfs, and what must be written first."""
    rows = {f"{prefix}active_file": 5, f"{prefix}inactive_file": 2, f"{prefix}unevictable": 7, f"{prefix}shmem": 9} | {
        name: 1 / 2 for name in dirty
    }
    stat = "\n".join(f"{name} {int(size * GIB)}" for name, size in rows.items())
    tree.own("4:memory:/a\n0::/a\n")
    tree.mounts(NOISE, tree.v1("memory", "/m"), tree.v2("/u"))
    tree.write("m/a" if make is v1_group else "u/a", **make(20 * GIB, 16 * GIB, "anon 5\n" + stat))
    assert tree.left() == [10 * GIB]


def test_every_group_of_version_2_above_a_process_counts(tree: Tree) -> None:
    tree.own("0::/a/b/c\n")
    tree.mounts(NOISE, tree.v2("/sys/fs/cgroup"))
    tree.write("sys/fs/cgroup/a/b/c", **v2_group("max", 3 * GIB))
    tree.write("sys/fs/cgroup/a/b", **v2_group(8 * GIB, 3 * GIB, f"inactive_file {GIB}"))
    tree.write("sys/fs/cgroup/a", **v2_group(6 * GIB, 5 * GIB), memory_high="max")
    tree.write("sys/fs/cgroup/other", **v2_group(1, 1))
    assert tree.left() == [6 * GIB, GIB]


def test_a_process_is_throttled_above_memory_high_and_that_is_its_limit(tree: Tree) -> None:
    tree.own("0::/a\n")
    tree.mounts(tree.v2("/u"))
    tree.write("u/a", **v2_group("max", GIB), memory_high=3 * GIB)
    assert tree.left() == [2 * GIB]
    tree.write("u/a", memory_max=2 * GIB)
    assert tree.left() == [GIB]


@pytest.mark.parametrize(("hierarchy", "wanted"), [(1, [3 * GIB, GIB]), (0, [3 * GIB])])
def test_groups_of_version_1_count_with_all_above_unless_the_kernel_counts_each_alone(
    tree: Tree, hierarchy: int, wanted: list[int]
) -> None:
    tree.own("5:cpu,cpuacct:/a/b\n4:hugetlb,memory:/a/b\n1:name=systemd:/x\n0::/x\n")
    tree.mounts(NOISE, tree.v1("cpu,cpuacct", "/sys/fs/cgroup/cpu,cpuacct"), tree.v1("hugetlb,memory", "/sys/fs/cgroup/memory"))
    tree.write("sys/fs/cgroup/memory/a/b", **v1_group(4 * GIB, GIB))
    tree.write("sys/fs/cgroup/memory/a", **v1_group(2 * GIB, GIB), memory_use_hierarchy=hierarchy)
    tree.write("sys/fs/cgroup/memory", **v1_group(UNLIMITED, 7 * GIB))
    assert tree.left() == wanted


@pytest.mark.parametrize("name", ["/docker/0123", "/", "/../..", "/../sister", "/docker/0123 (deleted)", "/kubepods/pod:1/x y"])
def test_a_container_that_sees_its_own_group_as_the_root_counts(tree: Tree, name: str) -> None:
    """Docker without a namespace of cgroups names a group of the host; one outside of the namespace has `..`."""
    tree.own(f"2:memory:{name}\n0::{name}\n")
    tree.mounts(tree.v1("memory", "/v1"), tree.v2("/v2"))
    tree.write("v1", **v1_group(3 * GIB, GIB))
    tree.write("v2", **v2_group(2 * GIB, GIB))
    tree.write("sister", **v2_group(1, 1))
    assert tree.left() == [2 * GIB, GIB]


def test_a_mount_may_begin_at_a_group_below_the_root(tree: Tree) -> None:
    """Docker with cgroups of version 1: the mount begins at the container's group, whose name is the host's."""
    tree.own("2:memory:/docker/01/inner\n")
    tree.mounts(tree.v1("memory", "/v1", begin="/docker/01"), tree.v1("memory", "/elsewhere", begin="/docker/012"))
    tree.write("v1/inner", **v1_group(4 * GIB, GIB))
    tree.write("v1", **v1_group(5 * GIB, GIB))
    tree.write("elsewhere", **v1_group(1, 1))
    assert tree.left() == [3 * GIB, 4 * GIB]


@pytest.mark.parametrize("name", ["a:b", "a b", "a\\b", "gone (deleted)", "über", ":", "x,memory"])
def test_names_of_groups_are_free(tree: Tree, name: str) -> None:
    tree.own(f"0::/top/{name}\n")
    escaped = "/".join(("", "my mounts", name)).replace("\\", "\\134").replace(" ", "\\040")
    tree.mounts(NOISE, tree.v2(escaped))
    tree.write(f"my mounts/{name}/top/{name}", **v2_group(2 * GIB, GIB))
    assert tree.left() == [GIB]


def test_a_removed_group_leaves_those_above_it(tree: Tree) -> None:
    tree.own("0::/top/mine (deleted)\n")
    tree.mounts(tree.v2("/u"))
    tree.write("u/top", **v2_group(2 * GIB, GIB))
    assert tree.left() == [GIB]


def test_groups_that_say_nothing_limit_nothing(tree: Tree, tmp_path: Path) -> None:
    tree.own("0::/a\n3:cpuset:/a\n")
    tree.mounts(tree.v2("/u"))
    tree.write("u/a")
    assert (tree.left(), cgroup.memory_peak(tree.root), cgroup.cores(tree.root)) == ([], None, None)
    nowhere = tmp_path / "nowhere"
    assert (list(cgroup.memory_left(nowhere)), cgroup.groups("memory", nowhere), cgroup.cores(nowhere)) == ([], [], None)


def test_a_limit_counts_where_the_usage_cannot_be_read(tree: Tree) -> None:
    tree.own("0::/a\n")
    tree.mounts(tree.v2("/u"))
    tree.write("u/a", memory_max=GIB)
    assert tree.left() == [GIB]


@given(st.binary(max_size=200), st.binary(max_size=300), st.binary(max_size=60))
def test_no_text_in_these_files_is_an_error(
    tmp_path_factory: pytest.TempPathFactory, own: bytes, mounts: bytes, text: bytes
) -> None:
    tree = Tree(tmp_path_factory.mktemp("tree"))
    (tree.root / "proc/self/cgroup").write_bytes(own + b"\n0::/\n1:memory,cpu:/" + own)
    (tree.root / "proc/self/mountinfo").write_bytes(mounts + b"\n" + (tree.v1("memory,cpu", "/") + tree.v2("/")).encode())
    for names in cgroup._MEMORY.values():
        for name in (*names.limits, names.usage, names.peak, "memory.stat", "cpu.max", "cpu.cfs_quota_us", "cpu.cfs_period_us"):
            (tree.root / name).write_bytes(text)
    assert all(isinstance(size, int) for size in tree.left())
    cgroup.memory_peak(tree.root)
    assert usable_cores(tree.root) >= 1


def test_the_peak_is_of_the_own_group(tree: Tree) -> None:
    tree.own("4:memory:/a\n")
    tree.mounts(tree.v1("memory", "/m"))
    tree.write("m/a", memory_max_usage_in_bytes=7)
    tree.write("m", memory_max_usage_in_bytes=99)
    assert cgroup.memory_peak(tree.root) == 7


# --- cores ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("here", "above", "wanted"), [
    ("100000 100000", "max 100000", 1), ("max 100000", "100000 100000", 1), ("400000 100000", "150000 100000", 2),
    ("50000 100000", None, 1), ("max 100000", None, None), ("1000 0", None, None), ("1", None, None), ("a b", None, None),
    ("", None, None),
])  # fmt: skip
def test_cores_follow_every_group_of_version_2(tree: Tree, here: str, above: str | None, wanted: int | None) -> None:
    tree.own("0::/top/mine\n")
    tree.mounts(tree.v2("/u"))
    tree.write("u/top/mine", cpu_max=here)
    tree.write("u/top", **({} if above is None else {"cpu_max": above}))
    assert cgroup.cores(tree.root) == wanted
    assert usable_cores(tree.root) == min(wanted or 1 << 20, usable_cores(tree.root / "none"))


@pytest.mark.parametrize(("quota", "wanted"), [("100000", 1), ("-1", None), ("150000", 2), ("1000", 1)])
def test_cores_follow_groups_of_version_1_that_share_a_mount(tree: Tree, quota: str, wanted: int | None) -> None:
    tree.own("3:cpu,cpuacct:/mine\n0::/\n")
    tree.mounts(tree.v1("cpu,cpuacct", "/sys/fs/cgroup/cpu,cpuacct"), tree.v2("/sys/fs/cgroup/unified"))
    tree.write("sys/fs/cgroup/cpu,cpuacct/mine", **{"cpu_cfs_quota_us": quota, "cpu_cfs_period_us": 100000})
    assert cgroup.cores(tree.root) == wanted


# --- real groups ---------------------------------------------------------------------------------------------------


@contextmanager
def below(controller: str, *names: str) -> Iterator[list[Path]]:
    """Real groups, each below the one before."""
    made: list[Path] = []
    with ExitStack() as stack:
        for group in cgroup.groups(controller):
            parent = group.folder
            if not (parent / f"{controller}.{'shares' if controller == 'cpu' else 'limit_in_bytes'}").exists():
                continue
            with suppress(OSError):
                for name in names:
                    parent = parent / f"{name}-{os.getpid()}"
                    parent.mkdir()
                    made.append(parent)
                    stack.callback(parent.rmdir)
                break
        if len(made) < len(names):
            pytest.skip(f"no group of {controller} can be made here")
        yield made


def inside(group: Path, check: Callable[[], bool]) -> bool:
    """Whether `check` holds in a process of a group."""

    def enter() -> bool:
        (group / "cgroup.procs").write_text(str(os.getpid()))
        return check()

    return in_a_fork(enter)


def comes_true(counted: Callable[[], bool]) -> None:
    """What the kernel counts holds, soon: it adds up the counts of its processors late, on a busy machine by seconds."""
    until = time.monotonic() + 20
    while not counted():
        assert time.monotonic() < until, cgroup.Group(cgroup.groups("memory")[0].folder, 1).text("memory.stat")
        time.sleep(0.1)


def write(path: Path, nbytes: int) -> None:
    """A file of random bytes, on the disk. Piece by piece: what a heap keeps of large blocks would count as memory in use."""
    with open(path, "wb") as file:
        for _ in range(nbytes >> 20):
            file.write(os.urandom(1 << 20))
        file.flush()
        os.fsync(file.fileno())


def read_twice(path: Path) -> None:
    piece = bytearray(1 << 20)
    for _ in range(3):
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            assert sum(mapped[at] for at in range(0, len(mapped), mmap.PAGESIZE)) >= 0
            while file.readinto(piece):
                pass


def test_page_cache_that_was_read_twice_is_free_in_a_real_group(tmp_path: Path) -> None:
    path, limit, cached = tmp_path / "weights", 256 << 20, 96 << 20
    with below("memory", "outer of:hf flash", "inner") as (outer, inner):
        (outer / "memory.limit_in_bytes").write_text(str(limit))

        def active() -> int:
            read_twice(path)
            return int(cgroup.Group(inner, 1).text("memory.stat").split("total_active_file ")[1].split()[0])

        def check() -> bool:
            write(path, cached)
            comes_true(lambda: active() > cached // 2)
            left = list(cgroup.memory_left())
            assert len([size for size in left if size <= limit]) == 1
            comes_true(lambda: limit - (40 << 20) < available_memory() <= limit)
            with mmap.mmap(-1, 64 << 20) as held:
                for at in range(0, len(held), mmap.PAGESIZE):
                    held[at] = 1
                comes_true(lambda: available_memory() < limit - len(held))
            return True

        assert inside(inner, check)


def test_a_cap_lies_below_the_group_of_this_process_and_shows_in_it() -> None:
    with below("memory", "hf-flash-outer") as (outer,):
        (outer / "memory.limit_in_bytes").write_text(str(512 << 20))

        def check() -> bool:
            with memory_cap(256 << 20) as cap:
                assert cap.folder is not None
                assert cap.folder.parent == outer
                assert inside(cap.folder, lambda: (256 << 20) - (32 << 20) < available_memory() <= 256 << 20)
            return True

        assert inside(outer, check)


def test_cores_follow_a_real_quota_and_a_real_affinity() -> None:
    with below("cpu", "hf-flash-outer", "inner") as (outer, inner):
        (outer / "cpu.cfs_quota_us").write_text("100000")
        (outer / "cpu.cfs_period_us").write_text("100000")
        assert inside(inner, lambda: usable_cores() == 1)

    def tied() -> bool:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        return usable_cores() == 1

    assert in_a_fork(tied)


def test_cores_follow_a_real_cpuset() -> None:
    parent = next((group.folder for group in cgroup.groups("cpuset") if group.version == 1), None)
    if parent is None or not os.access(parent, os.W_OK):
        pytest.skip("no cpuset of version 1 here")
    group = parent / f"hf-flash-{os.getpid()}"
    group.mkdir()
    try:
        (group / "cpuset.mems").write_text((parent / "cpuset.mems").read_text())
        (group / "cpuset.cpus").write_text(str(min(os.sched_getaffinity(0))))
        assert inside(group, lambda: usable_cores() == 1)
    finally:
        group.rmdir()
