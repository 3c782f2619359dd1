"""Options that several commands share, and the decorator that gives them to a command."""

from __future__ import annotations

import enum
import functools
import inspect
from collections.abc import Callable
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from attn_rewrite.cli.terminal import Terminal

if TYPE_CHECKING:
    from attn_rewrite.checkpoint import LoadedModel


class DType(enum.StrEnum):
    """Floating-point types a model can be loaded in."""

    FLOAT64 = "float64"
    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"


Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A transformers or diffusers folder, a .pt2 file, or module:callable.",
        show_default=False,
    ),
]


@dataclass(frozen=True)
class ModelOptions:
    """How a model is loaded and which inputs it is run with."""

    inputs: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Inputs as .safetensors; names are arguments."),
    ] = None
    batch: Annotated[int | None, typer.Option(min=1, help="Batch of generated inputs.")] = None
    length: Annotated[
        int | None, typer.Option(min=1, help="Sequence length of generated inputs.")
    ] = None
    dtype: Annotated[DType | None, typer.Option(help="Load the weights in this type.")] = None
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ...")] = None
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the checkpoint.")
    ] = False
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Read pickled weights (weights only).")
    ] = False

    def load(self, model: str, terminal: Terminal) -> LoadedModel:
        """Load the model and its inputs; what was generated is said on standard error."""
        with terminal.stage(f"loading {model}"):
            from attn_rewrite.checkpoint import load_model

            loaded = load_model(model, **self.for_loading())
        for note in loaded.notes:
            terminal.warn(note)
        return loaded

    def for_loading(self) -> dict[str, Any]:
        """Arguments of `load_model`; options not given keep its defaults."""
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        if self.dtype is not None:
            import torch

            given["dtype"] = getattr(torch, self.dtype.value)
        return {name: value for name, value in given.items() if value is not None}


@dataclass(frozen=True)
class OutputOptions:
    """How a result is written; read in `attn_rewrite.cli.app` before the command runs."""

    json: Annotated[
        bool, typer.Option("--json", help="Print one JSON document and nothing else.")
    ] = False
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False


def command(function: Callable[..., int]) -> Callable[..., int]:
    """Make a function a command: parameters that are dataclasses become one option per field.

    The parameter ``terminal`` gets the `Terminal` of the run; every command has `OutputOptions`.
    """
    hints = get_type_hints(function, include_extras=True)
    groups = {n: t for n, t in hints.items() if isinstance(t, type) and is_dataclass(t)}
    del groups["terminal"]

    @functools.wraps(function)
    def run(ctx: typer.Context, **given: Any) -> int:
        terminal: Terminal = ctx.obj
        for name, group in groups.items():
            given[name] = group(**{f.name: given.pop(f.name) for f in fields(group)})
        for f in fields(OutputOptions):
            del given[f.name]
        with terminal.capture_chatter():
            return function(terminal=terminal, **given)

    parameters = [_parameter("ctx", typer.Context)]
    for name, parameter in inspect.signature(function).parameters.items():
        if name in groups:
            parameters += _expand(groups[name])
        elif name != "terminal":
            parameters.append(_parameter(name, hints[name], parameter.default))
    parameters += _expand(OutputOptions)
    run.__signature__ = inspect.Signature(parameters, return_annotation=int)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    return run


def _expand(group: type) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    return [_parameter(f.name, hints[f.name], _default(f)) for f in fields(group)]


def _default(f: Field[Any]) -> Any:
    if f.default_factory is not MISSING:
        return f.default_factory()
    return inspect.Parameter.empty if f.default is MISSING else f.default


def _parameter(
    name: str, annotation: Any, default: Any = inspect.Parameter.empty
) -> inspect.Parameter:
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, kind, default=default, annotation=annotation)
