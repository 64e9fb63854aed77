"""The package: what is in its files, what it needs, and that it works from an installed copy, with and without a C compiler.

scripts/check_wheel does the same in fresh environments, in minutes.
"""

from __future__ import annotations

import ast
import ctypes
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

import hf_flash
from hf_flash import FlashOffloadConfig
from hf_flash.compute import library as native
from hf_flash.store.names import NOTICES
from tests.conftest import ROOT, TINY_OPT

PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
PACKAGE = ROOT / "hf_flash"
MODULES = {f"hf_flash/{path.relative_to(PACKAGE)}" for path in PACKAGE.rglob("*.py")}
C_SOURCES = {f"hf_flash/{path.relative_to(PACKAGE)}" for path in PACKAGE.rglob("*.[ch]")}
# imported only where an extra is asked for
OPTIONAL = ("hf_flash/serving/", "hf_flash/bench/plots.py", "hf_flash/bench/drawings.py")
STDLIB = sys.stdlib_module_names
ON_LINUX_X86 = sys.platform == "linux" and platform.machine() == "x86_64"


def plain(name: str) -> str:
    """A distribution's name as installers compare it, without its version."""
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", name)[0]).lower()  # type: ignore[index]


def imported() -> tuple[set[str], set[str]]:
    """Libraries that come with the package and its commands, and those that are imported when something needs them.

    The first are imported at the top of modules; the second inside of functions, or at the top of modules for an extra.
    """
    top, inside = set[str](), set[str]()
    for module in MODULES:
        tree = ast.parse((ROOT / module).read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            found = top if node in tree.body and not module.startswith(OPTIONAL) else inside
            if isinstance(node, ast.Import):
                found.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                found.add(node.module)
    return libraries(top), libraries(inside) - libraries(top)


def libraries(names: set[str]) -> set[str]:
    """Of what is imported, the distributions that are neither Python's nor ours."""
    return {plain(name.split(".")[0]) for name in names if name.split(".")[0] not in {*STDLIB, "hf_flash"}}


def test_what_is_imported_is_what_is_required() -> None:
    required = {plain(name) for name in PROJECT["dependencies"]}
    extras = {plain(name) for names in PROJECT["optional-dependencies"].values() for name in names}
    top, inside = imported()
    assert top <= required
    brought = {plain(name) for library in inside & extras for name in metadata.requires(library) or ()}
    assert inside <= required | extras | brought
    assert required - {"tqdm"} <= top | inside  # of which huggingface_hub makes the bars that are used


def test_everything_required_has_a_version_that_development_uses() -> None:
    pinned = {plain(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")}
    wanted = [*PROJECT["dependencies"], *(name for names in PROJECT["optional-dependencies"].values() for name in names)]
    assert {plain(name) for name in wanted} - {"hf-flash"} <= pinned


def test_hints_name_extras_that_exist() -> None:
    text = "".join((ROOT / module).read_text(encoding="utf-8") for module in MODULES)
    assert "install hf-flash" not in text.replace(NOTICES[1], "")  # it is on no index
    named = set(re.findall(r'with_extra\("(\w+)"\)', text))
    assert named
    assert named <= PROJECT["optional-dependencies"].keys()


def test_the_version_is_written_once_and_the_changelog_is_kept() -> None:
    assert PROJECT["dynamic"] == ["version"]
    where = [module for module in MODULES if f'"{hf_flash.__version__}"' in (ROOT / module).read_text(encoding="utf-8")]
    assert where == ["hf_flash/_version.py"]
    assert "## [Unreleased]\n" in (ROOT / "CHANGELOG.md").read_text()
    assert PROJECT["license"] == "Apache-2.0"
    assert "Apache License" in (ROOT / "LICENSE").read_text()


# --- files --------------------------------------------------------------------------------------------------------------


def build(folder: Path, kind: str, **env: str) -> tuple[Path, str]:
    """A `wheel` or an `sdist` from a clean copy of what it is made of, and what was said meanwhile."""
    source = folder / "source"
    shutil.copytree(ROOT / "hf_flash", source / "hf_flash", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    script = f"from setuptools import build_meta; build_meta.build_{kind}({str(folder)!r})"
    done = subprocess.run([sys.executable, "-c", script], cwd=source, env=os.environ | env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (file,) = [path for path in folder.iterdir() if path.is_file()]
    return file, done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("wheel"), "wheel")[0]


def test_a_wheel_has_every_module_the_types_the_licence_and_the_compiled_part(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        names = {name for name in file.namelist() if ".dist-info/" not in name}
        about = next(file.read(name).decode() for name in file.namelist() if name.endswith("/METADATA"))
        assert any(name.endswith("/licenses/LICENSE") for name in file.namelist())
    compiled = {f"hf_flash/compute/_native{SUFFIX}"}
    assert names - compiled == MODULES | {"hf_flash/py.typed"}
    assert compiled <= names or not ON_LINUX_X86
    assert f"Version: {hf_flash.__version__}\n" in about
    assert "License-Expression: Apache-2.0\n" in about


def test_the_tag_of_a_wheel_is_that_of_the_machine_it_was_made_on(wheel: Path) -> None:
    """Its compiled part is for one processor and system, and found by a name that has the version of Python in it."""
    python, abi, system = wheel.stem.split("-")[2:]
    assert python == abi == f"cp{sys.version_info.major}{sys.version_info.minor}"
    assert system == sysconfig.get_platform().replace("-", "_").replace(".", "_")


def test_a_source_distribution_has_what_a_wheel_is_made_of(tmp_path: Path) -> None:
    file, _ = build(tmp_path, "sdist")
    with tarfile.open(file) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert MODULES | C_SOURCES | {"pyproject.toml", "README.md", "LICENSE"} <= names


def test_the_compiled_part_of_a_wheel_is_the_one_that_its_modules_call(wheel: Path, tmp_path: Path) -> None:
    if not ON_LINUX_X86:
        pytest.skip("it is made for x86-64 Linux alone")
    with zipfile.ZipFile(wheel) as file:
        found = ctypes.CDLL(file.extract(f"hf_flash/compute/_native{SUFFIX}", tmp_path))
    assert found.hf_abi() == native.ABI


GENERATE = f"""
import logging, runpy, sys
logging.basicConfig(level=logging.INFO)
import hf_flash
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(TINY_OPT)!r}, quantization_config=hf_flash.FlashOffloadConfig())
print(hf_flash.__file__)
print(model.generate(**model.dummy_inputs, max_new_tokens=12, do_sample=False).tolist())
sys.argv[1:] = ["--version"]
runpy.run_module("hf_flash", run_name="__main__")
"""


def test_an_installed_copy_works_without_a_c_compiler_and_says_so(tmp_path: Path) -> None:
    wheel, said = build(tmp_path / "build", "wheel", CC="false")
    assert 'building extension "hf_flash.compute._native" failed' in said
    with zipfile.ZipFile(wheel) as file:
        file.extractall(tmp_path / "installed")
    env = os.environ | {"PYTHONPATH": str(tmp_path / "installed"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", GENERATE], cwd=tmp_path, env=env, capture_output=True, text=True)
    place, tokens, version = done.stdout.splitlines()
    assert Path(place).is_relative_to(tmp_path / "installed")
    assert version == f"hf-flash {hf_flash.__version__}"
    assert "no compiled part" in done.stderr
    model = AutoModelForCausalLM.from_pretrained(TINY_OPT, quantization_config=FlashOffloadConfig())
    assert tokens == str(model.generate(**model.dummy_inputs, max_new_tokens=12, do_sample=False).tolist())
