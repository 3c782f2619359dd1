"""A model made by the user's own code, named ``module:callable``."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from attn_rewrite.errors import CheckpointError
from attn_rewrite.tracing import user_line

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True, eq=False)
class Made:
    """What a callable returned: a model, and where it gave them the inputs to capture it with."""

    model: torch.nn.Module
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    dynamic_shapes: Any = None
    has_inputs: bool = False


def make_model(spec: str) -> Made:
    """Import ``module``, call ``callable`` without arguments, and read what it returns.

    Modules are found as ``python -m`` finds them: the working directory comes first.
    """
    made = _call(_resolve(spec), spec)
    if isinstance(made, torch.nn.Module):
        return Made(made)
    if isinstance(made, tuple) and 1 <= len(made) <= 4 and isinstance(made[0], torch.nn.Module):
        parts: list[Any] = [*made, None, None, None]
        if isinstance(parts[1], tuple | list | None) and isinstance(parts[2], dict | None):
            args, kwargs = tuple(parts[1] or ()), dict(parts[2] or {})
            return Made(parts[0], args, kwargs, parts[3], has_inputs=len(made) > 1)
    raise CheckpointError(
        f"{spec} returned {_shape_of(made)}, expected a torch.nn.Module or "
        "(model, args, kwargs, dynamic_shapes)"
    )


def _shape_of(made: Any) -> str:
    if isinstance(made, tuple):
        return f"({', '.join(type(part).__name__ for part in made)})"
    return f"a {type(made).__name__}"


def _resolve(spec: str) -> Any:
    module_name, _, attribute = spec.partition(":")
    try:
        with _working_directory_first():
            found: Any = importlib.import_module(module_name)
    except Exception as error:  # the user's module may raise anything while it is imported
        where = user_line(error)
        raise CheckpointError(
            f"cannot import {module_name!r} of {spec}: {type(error).__name__}: {error}"
            + (f" at {where}" if where else "; check the name and the working directory")
        ) from error
    for name in attribute.split("."):
        if not hasattr(found, name):
            raise CheckpointError(f"{module_name} has no {attribute!r}, named in {spec}")
        found = getattr(found, name)
    return found


def _call(found: Any, spec: str) -> Any:
    if isinstance(found, torch.nn.Module):
        return found
    if not callable(found):
        raise CheckpointError(
            f"{spec} has type {type(found).__name__}, expected a function that returns a model"
        )
    maker: Callable[[], Any] = found
    try:
        return maker()
    except Exception as error:  # the user's code may raise anything
        where = user_line(error)
        raise CheckpointError(
            f"{spec}() failed: {type(error).__name__}: {error}" + (f" at {where}" if where else "")
        ) from error


@contextmanager
def _working_directory_first() -> Iterator[None]:
    directory = os.getcwd()
    sys.path.insert(0, directory)
    try:
        yield
    finally:
        if directory in sys.path:
            sys.path.remove(directory)
