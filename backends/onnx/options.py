"""What an export may be asked for, checked before anything is loaded or written."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from attn_rewrite.errors import PolicyError, ToolError

TARGETS = ("portable", "onnxruntime")
CPU, CUDA = "cpu", "cuda"
PROVIDERS = (CPU, CUDA)
CACHES = (None, "float", "int8")
DEFAULT_OPSET = 20
OPSETS = range(18, 25)


def check_options(
    target: str,
    opset: int | None = None,
    cache: str | None = None,
    static: bool = False,
    provider: str = CPU,
) -> int:
    """The opset to write for these options; `PolicyError` where they cannot be served.

    Needs no model, so that a command can ask before it loads one.
    """
    if target not in TARGETS:
        raise PolicyError(f"unknown ONNX target {target!r}; expected {' or '.join(TARGETS)}.")
    if provider not in PROVIDERS:
        raise PolicyError(f"unknown provider {provider!r}; expected {' or '.join(PROVIDERS)}.")
    if provider != CPU and target == "portable":
        raise PolicyError(
            f"a portable file is for any runtime, and provider {provider!r} was asked for: give "
            "the target onnxruntime, or leave the provider out."
        )
    if cache not in CACHES:
        raise PolicyError(f"unknown cache {cache!r}; expected float or int8, or none.")
    if static and cache is not None:
        raise PolicyError(
            "static= and cache= were both given: the lengths of a step grow with its cache."
        )
    number = DEFAULT_OPSET if opset is None else opset
    if isinstance(number, bool) or not isinstance(number, int):
        raise PolicyError(f"opset is {number!r}, expected a whole number.")
    if number in OPSETS:
        return number
    why = (
        "from 25 on ONNX Runtime expands Attention into some 50 nodes, and torch's exporter writes "
        "files that do not load"
        if number > OPSETS[-1]
        else "torch's exporter starts at 18"
    )
    raise PolicyError(f"opset {number} is not supported: {why}; use {OPSETS[0]} to {OPSETS[-1]}.")


def check_place(path: Any) -> Path:
    """``path`` where a file may be written; `PolicyError` where it names none, `ToolError` where
    none can be.  Nothing is created."""
    try:
        place = Path(path)
        named = bool(place.name) and "\0" not in str(place)
    except TypeError:
        named = False
    if not named:
        raise PolicyError(f"the path of the ONNX file is {path!r}, expected the name of a file.")
    above = next((p for p in place.absolute().parents if os.path.lexists(p)), place)
    why = None
    if place.is_dir():
        why = "it is a folder"
    elif not above.is_dir():
        why = f"{above} is no folder"
    elif not os.access(above, os.W_OK | os.X_OK):
        why = f"{above} is not writable"
    if why is not None:
        raise ToolError(f"cannot write {place}: {why}; name another place.", stage="disk")
    return place
