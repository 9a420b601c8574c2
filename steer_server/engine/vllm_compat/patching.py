"""Replacing a function of vLLM's by one of ours that calls it, loudly where it is not what we know."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

from wrapt.importer import register_post_import_hook

_MARK = "__steer_server_seam__"


class SeamMovedError(RuntimeError):
    """vLLM is not where this version of Steer Server knows it to be."""


def wrap(owner: Any, name: str, parameters: tuple[str, ...], wrapper: Callable[..., Any]) -> None:
    """Replace `owner.name` by a function that calls `wrapper(original, *args, **kwargs)`.

    parameters: names that the original must take, those that the wrapper relies on. Wrapping twice does nothing.
    Raises SeamMovedError.
    """
    where = f"{getattr(owner, '__module__', '')}.{getattr(owner, '__qualname__', getattr(owner, '__name__', owner))}"
    original = vars(owner).get(name)
    if original is None:
        raise SeamMovedError(f"{where} has no {name} of its own; this release of vLLM is not supported")
    if getattr(original, _MARK, False):
        return
    missing = [p for p in parameters if p not in inspect.signature(original).parameters]
    if missing:
        raise SeamMovedError(f"{where}.{name} takes no {', '.join(missing)}; this release of vLLM is not supported")

    @functools.wraps(original)
    def replacement(*args: Any, **kwargs: Any) -> Any:
        return wrapper(original, *args, **kwargs)

    setattr(replacement, _MARK, True)
    setattr(owner, name, replacement)


def is_wrapped(owner: Any, name: str) -> bool:
    return bool(getattr(vars(owner).get(name), _MARK, False))


def when_imported(module: str, install: Callable[[ModuleType], None]) -> None:
    """Call `install(module)` as soon as `module` is imported, now if it has been.

    Plugins load in every process of vLLM; only those that use a module should pay for importing it.
    """
    register_post_import_hook(install, module)
