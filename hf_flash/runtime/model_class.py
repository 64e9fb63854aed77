"""A class for one loaded model: a subclass of the stock class, under its name, with methods of its own.

transformers has no way to give one model other methods. Methods set on the instance would make a reference cycle, and a model
that is dropped would keep its memory until the next garbage collection. So the model's class is replaced by a subclass that
nothing else uses. This relies on four properties of torch and transformers, which `tests/contract/test_transformers_seam.py`
checks:

- `model.__class__` may be assigned, and the model stays an instance of the stock class.
- Code that asks for a model's class (configs, cards, pipelines) asks for its name and module, which are the stock class's.
- The replaced methods exist on the stock class, and take no arguments that the replacements do not know.
- The stock class makes a model from a config alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def add_methods(model: Any, methods: Mapping[str, Any]) -> None:
    """Give one model methods of its own. These reach the stock methods through [`stock_methods`]."""
    stock = type(model)
    namespace = {"__module__": stock.__module__, "__doc__": stock.__doc__, **methods}
    model.__class__ = type(stock.__name__, (stock,), namespace)


def stock_methods(model: Any) -> Any:
    """The model with the methods of its stock class, including those that [`add_methods`] replaced."""
    return super(type(model), model)


def stock_class(model: Any) -> Any:
    """The class that a model with methods of its own was made from."""
    return type(model).__mro__[1]
