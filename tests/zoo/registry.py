"""All rows of all libraries, by name."""

from __future__ import annotations

import importlib
from functools import cache

from tests.zoo.rows import Row

LIBRARIES = ("torch", "transformers", "diffusers", "timm")


@cache
def rows(library: str) -> dict[str, Row]:
    """The rows of one library by name; only that library is imported."""
    module = importlib.import_module(f"tests.zoo.{library}_rows")
    return {r.name: r for r in module.rows()}


def row(name: str) -> Row:
    """The row called ``name``."""
    return rows(name.partition("/")[0])[name]
