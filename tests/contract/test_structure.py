"""The rooms of the package: their order, their size, and that values are asked where they are known."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import hf_flash
from tests.conftest import ROOT

PACKAGE = Path(hf_flash.__file__).parent
ROOMS = (  # each imports only from those before it
    "_version", "errors", "base", "config_arguments", "config", "machine", "store", "compute", "reading", "families",
    "predictors", "packing", "budget", "runtime", "calibration", "planning", "planner", "bench", "evaluation", "hub", "serving",
    "loading_experts", "loading", "quantizer", "registration", "__init__", "commands", "__main__",
)  # fmt: skip
SOURCES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))
LINES, FUNCTION_LINES, AT_TOP = 500, 45, 12


def room(path: Path) -> str:
    """The room of a file. A `__main__.py` starts a program: it may use everything."""
    return "__main__" if path.name == "__main__.py" else path.parts[0].removesuffix(".py")


def imported(tree: ast.Module) -> Iterator[str]:
    """The rooms that a module imports from, at its top or inside of functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[1] for alias in node.names if alias.name.startswith("hf_flash."))
        elif isinstance(node, ast.ImportFrom) and node.module == "hf_flash":
            yield from (alias.name if alias.name in ROOMS else "__init__" for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hf_flash."):
            yield node.module.split(".")[1]  # type: ignore[union-attr]


def parsed(path: Path) -> ast.Module:
    return ast.parse((PACKAGE / path).read_text(encoding="utf-8"))


def test_every_file_is_in_a_room() -> None:
    assert {room(path) for path in SOURCES} == set(ROOMS)


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_a_room_imports_only_from_those_below(path: Path) -> None:
    below = ROOMS[: ROOMS.index(room(path)) + 1]
    assert {name for name in imported(parsed(path)) if name not in below} == set()


def test_every_room_has_a_folder_of_tests() -> None:
    rooms = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert {name for name in rooms if not list((ROOT / "tests" / name).glob("test_*.py"))} == set()


USERS = {  # rooms, or files of them, that use a library; all others do without
    "safetensors": set[str](),
    "transformers": {
        "config", "registration", "quantizer", "compute/activation", "families/recognise", "families/experts",
        "families/conversions", "families/quantized", "runtime/observing", "runtime/transformers_model", "runtime/attention",
        "calibration", "planning", "bench", "evaluation", "serving", "commands/demo", "commands/doctor",
    },
    "huggingface_hub": {"store/checkpoint", "packing", "calibration", "planning", "bench", "evaluation", "hub", "commands"},
}  # fmt: skip
WITHOUT_TORCH = {
    "_version", "errors", "config_arguments", "config", "registration", "quantizer", "planner", "__init__",
    "base/sizes", "base/dtypes", "base/files", "base/folders", "base/locks", "base/heap", "base/arrays", "machine/cgroup",
    "machine/free_memory", "machine/about", "machine/memory_cap", "store/names", "budget/demand", "budget/plan",
    "budget/calibration_report", "bench/systems", "commands/main", "commands/arguments",
}  # fmt: skip


def libraries(path: Path) -> set[str]:
    """The libraries that a file imports anywhere."""
    found = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.partition(".")[0])
    return found


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_a_library_is_used_only_where_it_belongs(path: Path) -> None:
    for library, users in USERS.items():
        if library in libraries(path):
            assert {room(path), str(path.with_suffix(""))} & users or room(path) == "__main__"
    if str(path.with_suffix("")) in WITHOUT_TORCH:
        assert "torch" not in libraries(path)


def test_the_window_knows_neither_reader_nor_predictor() -> None:
    assert set(imported(parsed(Path("runtime/window.py")))) == {"base"}


PRIVATE = {  # names of libraries that begin with an underscore, or are as private: only in these files
    "commands/main.py": {"_ARGCOMPLETE"},
    "commands/interrupts.py": {"_exit"},
    "compute/expert_gate.py": {"_apply_gate"},
    "families/decoder.py": {"get_decoder"},
    "families/quantized.py": {"_scale_inv", "_dequantize_one"},
    "packing/readme.py": {"REGEX_YAML_BLOCK"},
    "predictors/low_bit.py": {"_weight_int8pack_mm", "_convert_weight_to_int4pack_for_cpu", "_weight_int4pack_mm_for_cpu"},
    "registration.py": {
        "AUTO_QUANTIZER_MAPPING", "AUTO_QUANTIZATION_CONFIG_MAPPING", "LOADING_ATTRIBUTES_CONFIG_TYPES",
        "merge_quantization_configs",
    },
    "runtime/experts.py": {"__class__"},
    "runtime/flash_embedding.py": {"__class__"},
    "runtime/flash_weights.py": {"_parameters", "_buffers"},
    "runtime/model_class.py": {"__class__"},
    "runtime/resident_linear.py": {"_parameters", "__class__"},
    "runtime/torch_internals.py": {
        "_C", "_TorchDispatchModeKey", "_current_level", "_functorch", "_get_dispatch_mode", "_get_dispatch_mode_pre_dispatch",
        "_make_wrapper_subclass", "_metadata", "_nn", "_ops", "_parse_to", "_pytree", "_schema", "_typed_storage",
    },
    "runtime/transformers_model.py": {
        "_hf_peft_config_loaded", "_keys_to_ignore_on_load_unexpected", "all_tied_weights_keys", "hidden_states",
        "_is_hf_initialized", "_weight_conversions", "_original_source_patterns", "_original_target_patterns",
        "_get_dtype_plan",
    },
    "serving/fields.py": {"_from_model_config"},
    "serving/transformers_serving.py": {"_GenerationCancelled", "_generate_managers", "_cb", "_cb_manager", "_model_locks"},
}  # fmt: skip
AS_PRIVATE = {
    "all_tied_weights_keys", "get_decoder", "hidden_states", "_metadata", "__class__", "REGEX_YAML_BLOCK",
    *PRIVATE["registration.py"],
}  # fmt: skip


def names_in(tree: ast.Module) -> Iterator[str]:
    """Attributes, strings that could be one, and what is imported from other packages."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
            yield node.value
        elif isinstance(node, ast.Import):
            yield from (part for alias in node.names for part in alias.name.split("."))
        elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("hf_flash"):
            yield from [*(node.module or "").split("."), *(alias.name for alias in node.names)]


def defined(tree: ast.Module) -> Iterator[str]:
    """Names that a module defines: of functions, classes, variables, and attributes that it gives objects."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.id if isinstance(node, ast.Name) else node.attr


def test_what_is_private_in_a_library_is_known_in_one_place() -> None:
    """The seam tests have a test for each of these names, test_public_surface.py for those of registration.py."""
    known = {*AS_PRIVATE, *(name for names in PRIVATE.values() for name in names)}
    own = {name for path in SOURCES for name in defined(parsed(path))} | {"_native", "_s"}  # of a file, of a field's name
    found = {}
    for path in SOURCES:
        strange = {name for name in names_in(parsed(path)) if name.startswith("_") and not name.endswith("__")} - own
        found[path.as_posix()] = strange | (known & set(names_in(parsed(path))))
    assert {path: names for path, names in found.items() if names} == PRIVATE


@pytest.mark.parametrize("folder", ["tests", "scripts", "examples", "docs"])
def test_modules_that_programs_in_a_text_import_exist(folder: str) -> None:
    """Nobody else would notice: a program that a test hands to another process, one on a page, one in a comment."""
    programs = re.compile(r"(?:from|import) (hf_flash[\w.]*)(?: import \(?((?:\w+(?:, )?)+))?")
    for path in (ROOT / folder).rglob("*"):
        if path.suffix not in {".py", ".md", ""} or not path.is_file():
            continue
        for module, names in programs.findall(path.read_text(encoding="utf-8")):
            found = importlib.import_module(module.rstrip("."))
            lacking = [name for name in names.split(", ") if name and not _has(found, name)]
            assert not lacking, path


def _has(module: ModuleType, name: str) -> bool:
    return hasattr(module, name) or importlib.util.find_spec(f"{module.__name__}.{name}") is not None


def test_few_modules_lie_directly_in_the_package() -> None:
    assert len(list(PACKAGE.glob("*.py"))) <= AT_TOP


@pytest.mark.parametrize("path", sorted({*PACKAGE.rglob("*.py"), *PACKAGE.rglob("*.[ch]")}), ids=lambda path: path.name)
def test_no_file_is_too_long_to_read(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LINES


def functions(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Names of functions, and their lines without the docstring."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            first = node.body[0]
            told = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)
            yield node.name, node.end_lineno - node.lineno + 1 - (first.end_lineno - first.lineno + 1 if told else 0)  # type: ignore[operator]


def test_functions_fit_on_a_screen() -> None:
    long = {f"{path}: {name}": lines for path in SOURCES for name, lines in functions(parsed(path)) if lines > FUNCTION_LINES}
    assert long == {}


def test_what_a_unit_is_made_of_is_known_in_one_place() -> None:
    """`store/unit.py`: nobody else says that a neuron has two rows of `d_model` numbers."""
    twice = re.compile(r"\b2 \* ?(self\.)?(\w+\.)*(d_model|d)\b|\b(d_model|d) \* ?2\b|\* 2 \* d_model")
    found = {
        str(path.relative_to(PACKAGE)): line.strip()
        for path in [*PACKAGE.rglob("*.py"), *PACKAGE.rglob("*.[ch]")]
        for line in path.read_text(encoding="utf-8").splitlines()
        if twice.search(line)
    }
    assert found == {}


def test_every_room_says_what_it_is_for() -> None:
    for path in PACKAGE.glob("*/__init__.py"):
        assert "TODO" not in path.read_text(encoding="utf-8")
        assert len(ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "") > 40, path
    assert not [path for path in SOURCES if '"""TODO"""' in (PACKAGE / path).read_text(encoding="utf-8")]


def test_the_drawing_of_the_rooms_has_their_order() -> None:
    """From the top down, and on a line from left to right, a room imports from those that follow."""
    page = (ROOT / "docs" / "structure.md").read_text(encoding="utf-8")
    (drawing,) = re.findall(r"^```\n(commands/.*?)^```", page, re.MULTILINE | re.DOTALL)
    undrawn = {"_version", "planner", "__init__", "__main__"}
    assert re.findall(r"(\w+)(?:/|\.py)\s", drawing) == [name for name in reversed(ROOMS) if name not in undrawn]


def test_the_page_about_structure_names_every_module() -> None:
    page = (ROOT / "docs" / "structure.md").read_text(encoding="utf-8")
    missing = [
        path for path in SOURCES if path.name != "__init__.py" and f"`{path.name}`" not in page and f"`{path}`" not in page
    ]
    assert missing == []
    for path in PACKAGE.rglob("*.[ch]"):
        assert f"`{path.name}`" in page, path
