"""Contract C1: what users and transformers may build on, and how the modules inside depend on one another."""

from __future__ import annotations

import ast
import copy
import inspect
import itertools
import json
import logging
import pickle
import re
import shutil
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.quantizers.auto as auto
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPTQConfig, OPTForCausalLM
from transformers.utils import logging as transformers_logging

import hf_flash
from hf_flash import FlashOffloadConfig, errors, registration
from hf_flash.commands.main import COMMANDS
from hf_flash.config_arguments import ARGUMENTS
from tests.conftest import ROOT
from tests.preloaded_python import python

PACKAGE = Path(hf_flash.__file__).parent
MODULES = sorted(str(path.relative_to(PACKAGE).with_suffix("")) for path in PACKAGE.rglob("*.py"))

# --- names ---------------------------------------------------------------------------------------------------------

VERBS = {"calibrate", "close", "configure", "push", "register_family", "repack", "restore", "stats"}
CLASSES = {"Family", "FlashOffloadConfig", "FlashStats"}


def error_classes() -> list[type[errors.HfFlashError]]:
    return [item for item in vars(errors).values() if isinstance(item, type) and issubclass(item, errors.HfFlashError)]


def test_the_public_names_are_those_of_the_contract() -> None:
    wanted = VERBS | CLASSES | {"__version__"} | {kind.__name__ for kind in error_classes()}
    assert set(hf_flash.__all__) == wanted
    assert hf_flash.__all__ == sorted(set(hf_flash.__all__))
    assert all(hasattr(hf_flash, name) for name in hf_flash.__all__)


def test_the_version_is_the_one_the_package_is_built_with() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.?\w+)?", hf_flash.__version__)
    assert "hf_flash._version.__version__" in (ROOT / "pyproject.toml").read_text()


def tree(module: str) -> ast.Module:
    return ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))


def undocumented(module: str) -> Iterator[str]:
    if not ast.get_docstring(tree(module)):
        yield module
    for item in tree(module).body:
        if isinstance(item, ast.FunctionDef | ast.ClassDef) and not item.name.startswith("_") and not ast.get_docstring(item):
            yield f"{module}.{item.name}"


@pytest.mark.parametrize("module", MODULES)
def test_every_module_and_what_is_public_in_it_has_a_docstring(module: str) -> None:
    assert list(undocumented(module)) == []


@pytest.mark.parametrize("name", sorted(VERBS | CLASSES))
def test_what_users_call_says_what_it_takes(name: str) -> None:
    item = getattr(hf_flash, name)
    text = inspect.getdoc(item) or ""
    assert len(text.splitlines()[0]) > 20
    target = item.__init__ if isinstance(item, type) else item
    assert inspect.signature(target).parameters
    assert all(p.annotation is not p.empty for n, p in inspect.signature(target).parameters.items() if n != "self")


def test_every_argument_of_the_config_is_documented_and_only_by_name() -> None:
    parameters = inspect.signature(FlashOffloadConfig).parameters
    own = set(parameters) - {"quant_method", "format_version", "unknown"}
    text = inspect.getdoc(FlashOffloadConfig) or ""
    assert {name for name in own if f"\n    {name} (" in text} == own
    assert all(p.kind in (p.KEYWORD_ONLY, p.VAR_KEYWORD) for p in parameters.values())


# --- errors --------------------------------------------------------------------------------------------------------


def drawn() -> dict[str, tuple[str, str | None]]:
    """Name -> parent and the builtin it also is, from the drawing in the docstring of `errors.py`."""
    path: list[str] = []
    found: dict[str, tuple[str, str | None]] = {}
    for line in (errors.__doc__ or "").splitlines():
        if match := re.match(r" {4}((?:│   |    )*)(├── |└── )?([A-Z]\w+Error)\b(?:.*\(also (\w+)\))?", line):
            depth = len(match[1]) // 4 + 1 if match[2] else 0
            path = [*path[:depth], match[3]]
            found[match[3]] = (path[-2] if depth else "Exception", match[4])
    return found


def test_the_errors_are_those_drawn_in_the_docstring() -> None:
    real = {}
    for kind in error_classes():
        parent, *builtin = kind.__bases__
        real[kind.__name__] = (parent.__name__, builtin[0].__name__ if builtin else None)
    assert drawn() == real


@pytest.mark.parametrize("kind", error_classes())
def test_an_error_prints_its_parts_and_survives_a_process_boundary(kind: type[errors.HfFlashError]) -> None:
    error = kind("it broke", where="here", expected=1, got=[2], hint="mend it")
    text = "it broke\n  where: here\n  expected: 1\n  got: [2]\n  to do: mend it"
    assert str(error) == text
    assert str(kind("it broke")) == "it broke"
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again)) == (kind, text)


def test_a_budget_error_carries_the_minimum_as_a_number() -> None:
    error = errors.BudgetError("too small", minimum_bytes=7)
    assert (error.minimum_bytes, errors.BudgetError("too small").minimum_bytes) == (7, None)
    assert pickle.loads(pickle.dumps(error)).minimum_bytes == 7


# --- imports -------------------------------------------------------------------------------------------------------


def in_a_fresh_process(script: str, *, with_torch: bool = False) -> subprocess.CompletedProcess[str]:
    """Run a script.

    Args:
        with_torch: in a process that has imported torch and what else transformers uses, though not transformers.
    """
    interpreter = python(with_transformers=False) if with_torch else [sys.executable]
    return subprocess.run([*interpreter, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)


def test_importing_prints_nothing_and_adds_one_entry_to_what_transformers_has() -> None:
    done = in_a_fresh_process(
        """
import logging, sys
import transformers.quantizers.auto as auto
types, quantizers, configs = (
    auto.LOADING_ATTRIBUTES_CONFIG_TYPES, dict(auto.AUTO_QUANTIZER_MAPPING), dict(auto.AUTO_QUANTIZATION_CONFIG_MAPPING))
loggers = list(logging.getLogger().handlers)
import hf_flash
assert auto.LOADING_ATTRIBUTES_CONFIG_TYPES == (*types, hf_flash.FlashOffloadConfig)
assert len(types) >= 8
assert {k: v for k, v in auto.AUTO_QUANTIZER_MAPPING.items() if k != "flash"} == quantizers
assert {k: v for k, v in auto.AUTO_QUANTIZATION_CONFIG_MAPPING.items() if k != "flash"} == configs
assert auto.AUTO_QUANTIZER_MAPPING["flash"].__module__ == "hf_flash.quantizer"
assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING["flash"] is hf_flash.FlashOffloadConfig
assert logging.getLogger().handlers == loggers and not logging.getLogger("hf_flash").handlers
unneeded = {"hf_flash.commands.main", "hf_flash.calibration.job", "matplotlib", "datasets", "rich", "transformers.pipelines",
            "transformers.models.opt.modeling_opt"}
assert not unneeded & set(sys.modules), unneeded & set(sys.modules)
""",
        with_torch=True,
    )
    assert (done.stdout, done.stderr) == ("", "")


def test_importing_again_changes_nothing() -> None:
    done = in_a_fresh_process(
        """
import importlib, sys
import transformers.quantizers.auto as auto
import hf_flash
import hf_flash
count = len(auto.LOADING_ATTRIBUTES_CONFIG_TYPES)
importlib.reload(hf_flash)
assert len(auto.LOADING_ATTRIBUTES_CONFIG_TYPES) == count
for name in [name for name in sys.modules if name.partition(".")[0] == "hf_flash"]:
    del sys.modules[name]
import hf_flash
assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING["flash"] is hf_flash.FlashOffloadConfig
assert hf_flash.FlashOffloadConfig in auto.LOADING_ATTRIBUTES_CONFIG_TYPES
""",
        with_torch=True,
    )
    assert (done.stdout, done.stderr) == ("", "")


HEAVY = {"torch", "transformers", "huggingface_hub", "numpy", "rich", "matplotlib", "tqdm", "psutil", "filelock", "packaging"}


def test_importing_is_light_and_names_are_found_when_they_are_used() -> None:
    done = in_a_fresh_process(f"""
import sys
import hf_flash
assert set(hf_flash.__all__) <= set(dir(hf_flash))
assert issubclass(hf_flash.BudgetError, hf_flash.errors.HfFlashError)
assert not hasattr(hf_flash, "stat")
assert not {HEAVY!r} & set(sys.modules), {HEAVY!r} & set(sys.modules)
assert hf_flash.FlashOffloadConfig is hf_flash.config.FlashOffloadConfig is vars(hf_flash)["FlashOffloadConfig"]
assert "torch" in sys.modules or "hf_flash.runtime.model" not in sys.modules
""")
    assert (done.stdout, done.stderr) == ("", "")


def test_type_checkers_see_every_public_name_where_it_is_found() -> None:
    (block,) = [node for node in tree("__init__").body if isinstance(node, ast.If)]
    assert ast.unparse(block.test) == "TYPE_CHECKING"
    imported = {alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert imported == hf_flash._MODULE_OF
    assert {*imported, "__version__"} == set(hf_flash.__all__)


def test_help_and_wrong_usage_import_nothing_heavy() -> None:
    lines = [["--help"], ["--version"], [], ["fly"], ["cache", "ls", "--help"], ["cache", "rm"], ["plan"], ["inspect"],
             ["bench", "--system", "x"], ["bench", "--flash-arg", "windw=1"], ["bench", "--sweep", "40:quantised"],
             ["serve", "model", "--reader", "tape"], ["demo", "model", "--memory-budget", "much"]]  # fmt: skip
    lines += [[command.name, "--help"] for group in COMMANDS.values() for command in group]
    done = in_a_fresh_process(f"""
import sys
from hf_flash.commands.main import main
for line in {lines!r}:
    try:
        main(line)
    except SystemExit as end:
        assert end.code == (0 if line[-1:] in (["--help"], ["--version"]) else 2), line
    else:
        raise AssertionError(line)
    assert not {HEAVY!r} & set(sys.modules), (line, {HEAVY!r} & set(sys.modules))
""")
    assert done.stdout.count("usage: hf-flash ") == len([*itertools.chain(*COMMANDS.values())]) + 2
    assert "did you mean 'window'?" in done.stderr


REGISTERED = """
import sys
import transformers.quantizers.auto as auto
import hf_flash
assert auto.AUTO_QUANTIZER_MAPPING["flash"] is sys.modules["hf_flash.quantizer"].FlashHfQuantizer
assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING["flash"] is hf_flash.FlashOffloadConfig
ours = [kind for kind in auto.LOADING_ATTRIBUTES_CONFIG_TYPES if kind.__name__ == "FlashOffloadConfig"]
assert ours == [hf_flash.FlashOffloadConfig]
assert not [finder for finder in sys.meta_path if type(finder).__module__ == "hf_flash.registration"]
module = sys.modules["transformers.quantizers"]
assert type(module.__loader__).__module__ == type(module.__spec__.loader).__module__ != "hf_flash.registration"
"""
ORDERS = {
    "before transformers": "import hf_flash, transformers",
    "between transformers and its quantizers": "import transformers, hf_flash",
    "between transformers and a model": "import transformers, hf_flash; transformers.AutoModelForCausalLM",
    "after the quantizers": "import transformers.quantizers, hf_flash",
    "in many threads": """
import hf_flash, threading, transformers  # whose own first import is not made for threads
threads = [threading.Thread(target=__import__, args=(name,)) for name in ("transformers.quantizers", "hf_flash.config") * 4]
for step in (threading.Thread.start, threading.Thread.join):
    for thread in threads:
        step(thread)
""",
}


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_the_method_is_registered_whatever_is_imported_first(order: str) -> None:
    done = in_a_fresh_process(f"{order}\n{REGISTERED}", with_torch=True)
    assert (done.stdout, done.stderr) == ("", "")


def test_registering_imports_the_config_and_the_quantizer_alone() -> None:
    """It runs inside of an import of transformers: what it imports may not need the rest of it (see registration.py)."""
    done = in_a_fresh_process(
        """
import sys
import transformers.quantizers, hf_flash
print(sorted(name.removeprefix("hf_flash.") for name in sys.modules if name.startswith("hf_flash.")))
""",
        with_torch=True,
    )
    light = {
        "_version",
        "base",
        "base.installing",
        "base.sizes",
        "config",
        "config_arguments",
        "errors",
        "quantizer",
        "registration",
    }
    assert set(ast.literal_eval(done.stdout)) == light


def test_until_transformers_is_imported_one_finder_waits_for_it() -> None:
    """It waits through reloading, importing hf_flash again, looking for the module, and a registration that fails."""
    done = in_a_fresh_process(
        f"""
import importlib, importlib.util, pickle, sys
import hf_flash
importlib.reload(hf_flash)
for name in [name for name in sys.modules if name.partition(".")[0] == "hf_flash"]:
    del sys.modules[name]
import hf_flash
from hf_flash import registration
def waiting():
    return [finder for finder in sys.meta_path if type(finder).__module__ == "hf_flash.registration"]
assert [type(finder) for finder in waiting()] == [registration._Finder]
spec = importlib.util.find_spec("transformers.quantizers")
assert "class" in spec.loader.get_source(spec.name) or "import" in spec.loader.get_source(spec.name)
assert pickle.loads(pickle.dumps(spec.loader)).get_filename(spec.name) == spec.origin
assert len(waiting()) == 1 and "transformers.quantizers" not in sys.modules
register = registration.register
def fail():
    raise RuntimeError("on purpose")
registration.register = fail
try:
    import transformers.quantizers
except RuntimeError as error:
    assert str(error) == "on purpose"
else:
    raise AssertionError("it was swallowed")
registration.register = register
assert len(waiting()) == 1 and "transformers.quantizers" not in sys.modules
{REGISTERED}""",
        with_torch=True,
    )
    assert (done.stdout, done.stderr) == ("", "")


def test_the_method_is_registered_with_a_package_in_a_zip_file(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "site.zip", "w") as file:
        file.writestr("transformers/__init__.py", "")
        file.writestr("transformers/quantizers/__init__.py", "print('imported')")
    done = in_a_fresh_process(f"""
import sys
sys.path.insert(0, {str(tmp_path / "site.zip")!r})
from hf_flash import registration
registration.register = lambda: print("registered")
import transformers.quantizers
assert type(transformers.quantizers.__loader__).__name__ == "zipimporter"
""")
    assert (done.stdout, done.stderr) == ("imported\nregistered\n", "")


@pytest.mark.parametrize(
    "name", ["AUTO_QUANTIZER_MAPPING", "AUTO_QUANTIZATION_CONFIG_MAPPING", "LOADING_ATTRIBUTES_CONFIG_TYPES"]
)
def test_what_transformers_keeps_to_itself_is_used_for_registration_only(name: str) -> None:
    assert hasattr(auto, name)
    users = {path.name for path in PACKAGE.rglob("*.py") if name in path.read_text(encoding="utf-8")}
    assert users == {"registration.py"}


# --- the seam to transformers --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def packed(opt: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hf_flash.repack(opt(), tmp_path_factory.mktemp("packed") / "opt-flash")


def test_transformers_knows_the_method() -> None:
    assert FlashOffloadConfig in auto.LOADING_ATTRIBUTES_CONFIG_TYPES
    assert auto.AUTO_QUANTIZER_MAPPING["flash"].__name__ == "FlashHfQuantizer"
    assert type(auto.AutoQuantizationConfig.from_dict({"quant_method": "flash"})) is FlashOffloadConfig


def test_our_config_meets_a_checkpoint_of_another_method() -> None:
    """And what is not ours stays transformers' business, however often we are registered."""
    merge = auto.AutoHfQuantizer.merge_quantization_configs
    assert [*inspect.signature(merge).parameters] == ["quantization_config", "quantization_config_from_args"]
    stored = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    passed = FlashOffloadConfig(window=3, checkpoint_quantization=None)
    found = merge(stored, passed)
    assert (type(found), found.window, found.checkpoint_quantization) == (FlashOffloadConfig, 3, stored)
    assert passed.checkpoint_quantization is None
    assert FlashOffloadConfig.from_dict(found.to_dict()).checkpoint_quantization == stored
    registration.register()
    again = auto.AutoHfQuantizer.merge_quantization_configs
    assert getattr(again, registration._STOCK) is getattr(merge, registration._STOCK)
    with pytest.raises(ValueError, match="GPTQConfig"):
        again(stored, GPTQConfig(bits=4))


def test_what_is_passed_reaches_a_model_that_has_a_config_without_a_warning(packed: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = AutoModelForCausalLM.from_pretrained(packed, quantization_config=FlashOffloadConfig(window=3))
    assert [str(item.message) for item in caught if "quantization_config" in str(item.message)] == []
    assert hf_flash.stats(model).window == 3


def test_only_our_own_warning_is_silenced() -> None:
    stored = {"quant_method": "gptq", "bits": 4}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        FlashOffloadConfig(window=3).get_loading_attributes()
        auto.AutoHfQuantizer.merge_quantization_configs({"quant_method": "flash"}, FlashOffloadConfig(window=3))
        assert caught == []
        auto.AutoHfQuantizer.merge_quantization_configs(stored, GPTQConfig(bits=4))
        warnings.warn("loading attributes", UserWarning, stacklevel=1)
    assert len(caught) == 2
    assert "loading attributes (e.g. [" in str(caught[0].message)


def test_loading_again_and_again_leaves_one_filter() -> None:
    with warnings.catch_warnings():
        FlashOffloadConfig().get_loading_attributes()
        filters = list(warnings.filters)
        for _ in range(5):
            FlashOffloadConfig(window=3).get_loading_attributes()
        assert list(warnings.filters) == filters


@pytest.mark.parametrize("kind", ["plain", "packed"])
def test_the_loading_report_has_nothing_to_say(
    request: pytest.FixtureRequest, opt: Callable[..., Path], caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    before = OPTForCausalLM._keys_to_ignore_on_load_unexpected
    folder = opt() if kind == "plain" else request.getfixturevalue("packed")
    transformers_logging.enable_propagation()
    try:
        with caplog.at_level(logging.WARNING):
            _, info = AutoModelForCausalLM.from_pretrained(
                folder, quantization_config=FlashOffloadConfig(), output_loading_info=True
            )
    finally:
        transformers_logging.disable_propagation()
    assert {name: set(keys) for name, keys in info.items() if keys} == {}
    assert caplog.text == ""
    assert before == OPTForCausalLM._keys_to_ignore_on_load_unexpected


def test_another_tensor_is_still_reported(packed: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(packed, tmp_path / "more"))
    (file,) = folder.glob("model-*.safetensors")
    save_file(load_file(file) | {"model.decoder.surprise": torch.zeros(2)}, file, metadata={"format": "pt"})
    _, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert set(info["unexpected_keys"]) == {"model.decoder.surprise"}


# --- the config ----------------------------------------------------------------------------------------------------

NAMED: dict[str, Any] = {
    "predictor": "quantized", "predictor_bits": 8, "predictor_group_size": 32, "predictor_margin": 2.5, "window": 7,
    "memory_budget": "6GiB", "reader": "mmap", "io_threads": 4,
}  # fmt: skip
HEAD = {"quant_method": "flash", "format_version": 1}


@pytest.mark.parametrize("named", [{}, {"window": 7}, {"memory_budget": 123456, "reader": "direct"}, NAMED])
def test_a_config_writes_what_was_named_and_reads_it_back(named: dict[str, Any]) -> None:
    config = FlashOffloadConfig(**named)
    assert config.to_dict() == HEAD | named
    text = json.dumps(config.to_dict())
    again = FlashOffloadConfig.from_dict(json.loads(text))
    assert again.to_dict() == config.to_dict()
    assert {name: getattr(again, name) for name in NAMED} == {name: getattr(config, name) for name in NAMED}
    assert json.loads(config.to_json_string(use_diff=False)) == config.to_dict()
    assert dict(iter(config)) == config.to_dict()


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda config: pickle.loads(pickle.dumps(config))])
def test_a_config_can_be_copied(again: Callable[[Any], Any]) -> None:
    config = FlashOffloadConfig(**NAMED, cache_dir="/somewhere")
    other = again(config)
    assert other.to_dict() == config.to_dict()
    assert other.cache_dir == "/somewhere"


def test_where_the_cache_lies_is_never_written() -> None:
    config = FlashOffloadConfig(cache_dir="/somewhere", window=2)
    assert config.to_dict() == HEAD | {"window": 2}
    config.cache_dir = "/elsewhere"
    config.remember(cache_dir="/nowhere")
    assert "cache_dir" not in config.to_dict()
    assert "where" not in repr(config)
    assert FlashOffloadConfig.from_dict(HEAD | {"cache_dir": "/stored"}).to_dict() == HEAD


def test_what_is_passed_wins_over_the_process_over_the_stored_over_the_default() -> None:
    stored = FlashOffloadConfig.from_dict(HEAD | {"window": 2, "io_threads": 2, "reader": "mmap"})
    hf_flash.configure(window=3, io_threads=3)
    try:
        stored.flash_arguments = FlashOffloadConfig(window=4).get_loading_attributes()["flash_arguments"]
        assert (stored.window, stored.io_threads, stored.reader, stored.predictor_bits) == (4, 3, "mmap", 4)
        assert stored.to_dict() == HEAD | {"window": 4, "io_threads": 2, "reader": "mmap"}
    finally:
        hf_flash.configure(window=None, io_threads=None)
    assert (stored.window, stored.io_threads) == (4, 2)


def test_none_is_unset_and_not_a_value() -> None:
    config = FlashOffloadConfig(**dict.fromkeys([*NAMED, "cache_dir"]))
    assert config.to_dict() == HEAD
    assert (config.window, config.reader, config.io_threads) == (5, "auto", 16)


def test_the_signature_the_table_and_the_docstring_have_the_same_arguments() -> None:
    parameters = inspect.signature(FlashOffloadConfig).parameters
    assert [*parameters] == [*ARGUMENTS, "quant_method", "format_version", "checkpoint_quantization", "unknown"]
    assert all(parameters[name].default is None for name in ARGUMENTS)
    text = inspect.getdoc(FlashOffloadConfig) or ""
    words = " ".join(text.split())
    assert all(f"{name} ({item.types}): {item.about}" in words for name, item in ARGUMENTS.items())
    assert max(map(len, text.splitlines())) <= 124
    assert text.index("Args:\n    predictor (") < text.index("Raises:\n    ConfigError:")


@pytest.mark.parametrize("name", ARGUMENTS)
def test_defaults_and_choices_of_an_argument_are_valid(name: str) -> None:
    item = ARGUMENTS[name]
    assert getattr(FlashOffloadConfig(), name) == item.default
    for value in [*item.option.get("choices", ()), *([item.default] if item.default is not None else [])]:
        assert getattr(FlashOffloadConfig(**{name: value}), name) == value
    assert (item.default is None) == (item.default_text is not None)


# --- foreign state -------------------------------------------------------------------------------------------------


def test_no_module_has_the_name_of_something_public() -> None:
    """Importing it would put the module in the place of the function."""
    assert {Path(module).name for module in MODULES} & set(hf_flash.__all__) == set()


FACTORIES = {
    "arange", "as_tensor", "asarray", "empty", "empty_strided", "eye", "full", "linspace", "logspace", "normal", "ones", "rand",
    "randint", "randn", "randperm", "scalar_tensor", "tensor", "zeros",
}  # fmt: skip


@pytest.mark.parametrize("module", MODULES)
def test_what_makes_tensors_says_their_dtype_and_device(module: str) -> None:
    """torch's defaults are anybody's to change; the compiled part gets addresses, and sees neither."""
    calls = [
        node
        for node in ast.walk(tree(module))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in FACTORIES
        if ast.unparse(node.func.value) == "torch"
    ]
    assert [ast.unparse(call) for call in calls if not {"dtype", "device"} <= {key.arg for key in call.keywords}] == []
