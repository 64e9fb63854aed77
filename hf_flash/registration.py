"""How transformers learns of `quant_method: "flash"`: at once, or as soon as it is imported.

`import hf_flash` promises that transformers knows the method, in whatever order the two are imported. The simple way would be
to import transformers here, which takes six seconds of CPU time because it imports torch. But Python runs
`hf_flash/__init__.py` before every module of the package, so `hf-flash --help` and a mistyped option would have to wait for
these seconds as well. Therefore:

    transformers.quantizers is loaded        register now
    it is not loaded                         put a finder on `sys.meta_path`, and register when it is imported

The finder answers for that one module. It asks the other finders for the module's spec and puts a loader in front of the
spec's own loader. That loader runs the module's code, takes itself off the module, registers the method, and removes the
finder. Looking for the module without importing it, as `importlib.util.find_spec` does, registers nothing and leaves the
finder where it is. The import statement raises any error of registering, and the next import tries again.

The cost: one string comparison for each module that Python looks for, until transformers is imported.

The requirement on `hf_flash.quantizer` and `hf_flash.config`: at their top they import next to nothing of ours.
transformers.modeling_utils imports transformers.quantizers in its own first lines, so `register` runs while modeling_utils is
half imported, and while this thread holds the import lock of transformers.quantizers. A module that needs modeling_utils
could not be imported at that point. A module that another thread is importing, and that waits for transformers, would be a
deadlock, which Python reports as an error.

transformers has functions to register a quantizer and its config. It has none for the other things we need: these are used
in this module only, and tests/contract/test_public_surface.py names them:

    AUTO_QUANTIZER_MAPPING, AUTO_QUANTIZATION_CONFIG_MAPPING   to take out our entry when hf_flash is imported again
    LOADING_ATTRIBUTES_CONFIG_TYPES                            only classes in it may bring arguments for a stored config
    AutoHfQuantizer.merge_quantization_configs                 refuses a config of one method for a checkpoint of another. Ours
                                                               goes with both: experts in mxfp4 or fp8 are read as stored
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, Final

from hf_flash.config_arguments import METHOD

_QUANTIZERS: Final = "transformers.quantizers"
_STOCK: Final = "stock_of_hf_flash"


def register_when_imported() -> None:
    """Make transformers know the method: now if its quantizers are loaded, else when they are. Called by `import hf_flash`.

    Calling it again changes nothing. If the modules of hf_flash were imported a second time, it registers their new classes.
    """
    _put_finder(_Finder())  # before the check, since another thread may be importing transformers
    if _QUANTIZERS in sys.modules:
        _put_finder(None)
        register()


def register() -> None:
    """Import transformers' quantizers and register the method with them, in place of an earlier registration of ours."""
    from transformers.quantizers import auto, register_quantization_config, register_quantizer

    from hf_flash.config import FlashOffloadConfig
    from hf_flash.quantizer import FlashHfQuantizer

    for registry in (auto.AUTO_QUANTIZATION_CONFIG_MAPPING, auto.AUTO_QUANTIZER_MAPPING):
        if METHOD in registry and _is_ours(registry[METHOD]):
            del registry[METHOD]
    register_quantization_config(METHOD)(FlashOffloadConfig)
    register_quantizer(METHOD)(FlashHfQuantizer)
    others = [kind for kind in auto.LOADING_ATTRIBUTES_CONFIG_TYPES if not _is_ours(kind)]
    auto.LOADING_ATTRIBUTES_CONFIG_TYPES = (*others, FlashOffloadConfig)
    auto.AutoHfQuantizer.merge_quantization_configs = staticmethod(_merging(auto.AutoHfQuantizer.merge_quantization_configs))


def _merging(stock: Any) -> Any:
    """Wrap `merge_quantization_configs` to accept our config for a checkpoint that another method has quantized."""
    stock = getattr(stock, _STOCK, stock)  # unwrap an earlier registration

    def merge_quantization_configs(quantization_config: Any, quantization_config_from_args: Any) -> Any:
        values = quantization_config.to_dict() if hasattr(quantization_config, "to_dict") else quantization_config
        is_ours = isinstance(values, dict) and values.get("quant_method") == METHOD
        if _is_ours(type(quantization_config_from_args)) and not is_ours:
            return quantization_config_from_args.for_checkpoint(values)
        return stock(quantization_config, quantization_config_from_args)

    setattr(merge_quantization_configs, _STOCK, stock)
    return merge_quantization_configs


def _is_ours(kind: type) -> bool:
    return kind.__module__.startswith("hf_flash.")


def _put_finder(finder: _Finder | None) -> None:
    """Make this our only finder, or remove ours.

    The list is replaced, not changed: another thread may be iterating over it for an import of its own, and would skip a
    finder if one before it were removed.
    """
    others = [one for one in sys.meta_path if type(one).__module__ != __name__]  # also those of an earlier copy of this module
    sys.meta_path = [*([finder] if finder else []), *others]


class _Finder:
    """Finds `transformers.quantizers` through the other finders, and sees to it that the method is registered after loading."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _QUANTIZERS:
            return None
        for finder in sys.meta_path:
            find = None if finder is self else getattr(finder, "find_spec", None)
            spec: ModuleSpec | None = find(fullname, path, target) if find else None
            if spec is not None:
                if hasattr(spec.loader, "exec_module"):
                    spec.loader = _Loader(spec.loader)  # type: ignore[assignment]
                return spec
        return None


class _Loader:
    """Stands in front of a module's own loader until the module's code has run, and passes everything else on to it."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        created: ModuleType | None = self.loader.create_module(spec)
        return created

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        register()
        _put_finder(None)

    def __getattr__(self, name: str) -> Any:
        if name == "loader":  # while it is copied or unpickled
            raise AttributeError(name)
        return getattr(self.loader, name)
