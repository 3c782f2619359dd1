"""Generated source becomes a Triton kernel: a module in a file, as Triton reads its text."""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

from attn_rewrite import knobs
from attn_rewrite.backends.triton.emit import Source
from attn_rewrite.errors import ToolError


def source_directory() -> Path:
    """Where generated kernels are kept, below the cache of this user."""
    return knobs.cache_directory() / "triton"


def kernel_of(source: Source) -> Any:
    """The kernel of ``source``; the same object for the same text.

    Whether it runs compiled or interpreted is decided when it is first built in a process.  Raises
    `ToolError` where the cache folder cannot be written.
    """
    return _kernel(source.name, source.key, source.text)


@lru_cache(maxsize=512)
def _kernel(name: str, key: str, text: str) -> Any:
    path = source_directory() / f"{name}-{key}.py"
    _write_once(path, text)
    module_name = f"attn_rewrite_generated_{name}_{key}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    spec.loader.exec_module(module)
    return getattr(module, name)


def _write_once(path: Path, text: str) -> None:
    try:
        if not (path.exists() and path.read_text("utf-8") == text):
            write_whole(path, text)
    except (OSError, UnicodeDecodeError) as error:
        raise ToolError(
            f"the generated kernel cannot be written to {path}: "
            f"{getattr(error, 'strerror', None) or error}; point {knobs.CACHE} at a writable "
            "folder",
            stage="triton source",
        ) from error


def write_whole(path: Path, text: str) -> None:
    """Write a file that no reader ever sees half written; nothing is left behind on an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, part = tempfile.mkstemp(dir=path.parent, prefix=path.stem)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as out:
            out.write(text)
        os.replace(part, path)
    except BaseException:
        os.unlink(part)
        raise


def is_interpreted(kernel: Any) -> bool:
    """Does the kernel run in Triton's interpreter (``TRITON_INTERPRET=1``)?"""
    return type(kernel).__name__ == "InterpretedFunction"
