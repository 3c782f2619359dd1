"""Triton kernels emitted from cascades; public names are lazy, as triton is optional."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from attn_rewrite.backends.triton.emit import Source, emit
    from attn_rewrite.backends.triton.lower import TritonKernel, lower
    from attn_rewrite.backends.triton.schedule import Schedule

_HOME = {
    "Schedule": "schedule",
    "Source": "emit",
    "TritonKernel": "lower",
    "emit": "emit",
    "lower": "lower",
}

__all__ = ["Schedule", "Source", "TritonKernel", "emit", "lower"]


def __getattr__(name: str) -> object:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{home}"), name)


def __dir__() -> list[str]:
    return __all__
