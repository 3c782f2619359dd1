"""Capture: a model and example inputs become one FX graph of pre-dispatch ATen operators.

Ahead of time, by `torch.export` (non-strict): Python runs once, so the graph is the path the
example inputs took.  Batch and sequence stay dynamic where the model allows; where it does not,
a note says which dimension is static and why.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.export import Dim, ExportedProgram, ShapesCollection
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from attn_rewrite.axes import (
    BATCH,
    SEQUENCE,
    DynamicDim,
    InputTensor,
    describe,
    guess_axes,
    named_tensors,
)
from attn_rewrite.called import mark_parameters
from attn_rewrite.containers import make_known
from attn_rewrite.errors import CaptureError
from attn_rewrite.tracing import caches_emptied, masks_unread, quiet, untouched, user_line

_REMEDIES = (
    "try (1) example inputs of the sizes you run, with dynamic_shapes= that makes the dimension "
    "named here static, or (2) torch.compile(model, backend='attn_rewrite'), which breaks the "
    "graph at that line instead"
)


@dataclass(frozen=True, eq=False)
class Captured:
    """A model as one graph.

    ``graph`` is ``program.module()``: it has the parameters of the source model *by identity*, its
    call signature, and guards that raise when a static dimension gets another size.  ``args`` and
    ``kwargs`` are the example inputs as given; ``notes`` are plain sentences on what is dynamic,
    what is static and why; ``seconds`` is wall-clock time.
    """

    program: ExportedProgram = field(repr=False)
    graph: GraphModule = field(repr=False)
    args: tuple[Any, ...] = field(repr=False)
    kwargs: dict[str, Any] = field(repr=False)
    dynamic: tuple[DynamicDim, ...]
    notes: tuple[str, ...]
    seconds: float


def capture_model(
    model: torch.nn.Module | ExportedProgram,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
) -> Captured:
    """Capture ``model`` in the mode (train or eval), dtype and device it has.

    ``args`` and ``kwargs`` are example inputs: trees of tensors and plain values.  With
    ``dynamic_shapes=None`` batch and sequence are made dynamic as far as the model allows;
    otherwise ``dynamic_shapes`` means what it means to `torch.export.export`.  The model is left as
    it was.  An exported program is a graph already: its own dynamic dimensions stay as they are.
    Raises `CaptureError`, naming the model's source line, when no graph can be made.
    """
    start = time.perf_counter()
    if isinstance(model, ExportedProgram):
        return _of_program(model, args, kwargs, dynamic_shapes, start)
    own = (tuple(args), dict(kwargs or {}))
    # A collection of shapes knows tensors by identity.
    args, kwargs = own if isinstance(dynamic_shapes, ShapesCollection) else _without_gaps(own)
    inputs = _checked_inputs(model, args, kwargs)
    with quiet(), masks_unread():
        if dynamic_shapes is None:
            program, attempt = _climb_down(model, args, kwargs, inputs)
        else:
            given = {item.name: dict.fromkeys(range(item.tensor.dim()), "given") for item in inputs}
            attempt = _Attempt("as given by the caller", given, args, kwargs)
            if isinstance(dynamic_shapes, ShapesCollection):
                dynamic_shapes = dynamic_shapes.dynamic_shapes(  # type: ignore[no-untyped-call]
                    model, args, kwargs
                )
            program = _export(model, attempt, dynamic_shapes)
    graph = program.module()
    mark_parameters(graph)
    _check_shared(model, graph)
    dynamic, sentences = describe(program, inputs, attempt.axes)
    return Captured(
        program=program,
        graph=graph,
        args=args,
        kwargs=kwargs,
        dynamic=dynamic,
        notes=(*_mode_notes(model), *_repeat_notes(inputs), *attempt.notes, *sentences),
        seconds=time.perf_counter() - start,
    )


def _of_program(
    program: ExportedProgram,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None,
    dynamic_shapes: Any,
    start: float,
) -> Captured:
    """An exported program as it is, with its own example inputs where none are given."""
    if dynamic_shapes is not None:
        raise CaptureError(
            "dynamic_shapes was given with an exported program, whose dynamic dimensions are fixed;"
            " leave it out, or export the model again"
        )
    if not args and not kwargs:
        args, kwargs = program.example_inputs or ((), {})
    graph, kwargs = program.module(), dict(kwargs or {})
    mark_parameters(graph)
    inputs = _checked_inputs(graph, args, kwargs)
    try:
        dynamic, sentences = describe(program, inputs, {})
    except ValueError as error:
        raise CaptureError(
            f"the inputs have {len(inputs)} tensors, but the exported program takes others; give "
            "the inputs it was exported with"
        ) from error
    seconds = time.perf_counter() - start
    return Captured(program, graph, args, kwargs, dynamic, sentences, seconds)


def _without_gaps(
    values: tuple[tuple[Any, ...], dict[str, Any]],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Tensors of a tree that are a part of something larger (``ids[:, :8]``), or overlap
    themselves, as tensors of their own: tracing would demand their strides of every later call."""

    def whole(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.layout != torch.strided or tensor.requires_grad:
            return tensor
        plain = torch.empty_like(tensor, device="meta").stride() == tensor.stride()
        return tensor if plain else tensor.contiguous()

    own: tuple[tuple[Any, ...], dict[str, Any]]
    own = pytree.tree_map_only(torch.Tensor, whole, values)
    return own


def _checked_inputs(
    model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[InputTensor, ...]:
    if not isinstance(model, torch.nn.Module):
        raise CaptureError(
            f"cannot capture {model!r}: it is a {type(model).__name__}, expected a "
            "torch.nn.Module; wrap the function in a module whose forward calls it"
        )
    make_known((args, kwargs))
    try:
        return named_tensors(model.forward, args, kwargs)
    except TypeError as error:
        raise CaptureError(
            f"the example inputs do not fit {type(model).__name__}.forward: {error}; "
            "pass example_args and example_kwargs as the model is called"
        ) from error


# The ladder: everything dynamic, then less and less, each step down stated in a note.


@dataclass(frozen=True, eq=False)
class _Attempt:
    """One rung: the dimensions asked to be dynamic, and the inputs to trace with."""

    label: str
    axes: dict[str, dict[int, str]]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    notes: tuple[str, ...] = ()


def _rungs(
    args: tuple[Any, ...], kwargs: dict[str, Any], inputs: tuple[InputTensor, ...]
) -> Iterator[_Attempt]:
    """Attempts in the order they are made; the last is fully static."""
    axes = guess_axes(inputs)
    wide_args, wide_kwargs = args, kwargs
    notes: tuple[str, ...] = ()
    if _batch_is_one(inputs, axes):
        wide_args, wide_kwargs = _widened(args, kwargs, inputs, axes)
        notes = (
            "captured with the example batch of 1 repeated to 2: a size of 1 cannot be dynamic",
        )
    roles = {role for dims in axes.values() for role in dims.values()}
    if BATCH in roles and SEQUENCE in roles:
        label = "batch and sequence dynamic"
        yield _Attempt(label, axes, wide_args, wide_kwargs, notes)
    if BATCH in roles:
        yield _Attempt("batch dynamic", _only(axes, BATCH), wide_args, wide_kwargs, notes)
    if SEQUENCE in roles:
        yield _Attempt("sequence dynamic", _only(axes, SEQUENCE), args, kwargs)
    yield _Attempt("all sizes static", {}, args, kwargs)


def _only(axes: dict[str, dict[int, str]], role: str) -> dict[str, dict[int, str]]:
    return {name: {d: r for d, r in dims.items() if r == role} for name, dims in axes.items()}


def _batch_is_one(inputs: tuple[InputTensor, ...], axes: dict[str, dict[int, str]]) -> bool:
    """Every guessed batch dimension has size 1, and there is one."""
    sizes = [i.tensor.shape[d] for i in inputs for d, r in axes[i.name].items() if r == BATCH]
    return bool(sizes) and set(sizes) == {1}


def _widened(
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    inputs: tuple[InputTensor, ...],
    axes: dict[str, dict[int, str]],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The inputs with their batch repeated twice."""
    batched = {id(i.tensor) for i in inputs if axes[i.name].get(0) == BATCH}

    def widen(leaf: torch.Tensor) -> torch.Tensor:
        return _repeat_batch(leaf) if id(leaf) in batched else leaf

    wide: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_map_only(
        torch.Tensor, widen, (args, kwargs)
    )
    return wide


def _repeat_batch(tensor: torch.Tensor) -> torch.Tensor:
    """Twice the batch, in the memory order the tensor has: a strided input stays strided."""
    strides = tensor.stride()
    order = sorted(range(tensor.dim()), key=lambda d: -strides[d])
    inverse = sorted(range(tensor.dim()), key=lambda d: order[d])
    repeats = [2 if d == 0 else 1 for d in order]
    return tensor.detach().permute(order).repeat(repeats).permute(inverse)


def _climb_down(
    model: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    inputs: tuple[InputTensor, ...],
) -> tuple[ExportedProgram, _Attempt]:
    """The first attempt that exports; the error of the static one when none does."""
    steps: list[str] = []
    failure: CaptureError | None = None
    for attempt in _rungs(args, kwargs, inputs):
        try:
            program = _export(model, attempt)
        except CaptureError as error:
            failure = error
            steps.append(f"{attempt.label}: not possible, because {_cause(error)}")
        else:
            noted = replace(attempt, notes=(*steps, *attempt.notes))
            return program, noted
    assert failure is not None
    raise failure


def _collection(
    model: torch.nn.Module,
    axes: dict[str, dict[int, str]],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> ShapesCollection | None:
    """Dim.AUTO for the dimensions in ``axes``: dynamic unless tracing proves a constant."""
    shapes = ShapesCollection()  # type: ignore[no-untyped-call]
    for item in named_tensors(model.forward, args, kwargs):
        if dims := axes.get(item.name):
            shapes[item.tensor] = dict.fromkeys(dims, Dim.AUTO)
    return shapes if len(shapes) else None


def _export(
    model: torch.nn.Module, attempt: _Attempt, dynamic_shapes: Any = None
) -> ExportedProgram:
    """Export with ``dynamic_shapes``, or with the dimensions of the attempt.

    Every tensor goes in as an alias of its own.  torch takes one tensor passed as query and as key
    for one input, and a model that asks ``query is key`` would be captured as if it always were;
    and torch leaves marks on the tensors of a failed attempt, which the next one would obey.  So
    would what the model keeps of an attempt, which is put back after each.
    """
    args, kwargs = pytree.tree_map_only(torch.Tensor, _alias, (attempt.args, attempt.kwargs))
    if dynamic_shapes is None:
        dynamic_shapes = _collection(model, attempt.axes, args, kwargs)
    # The hook sees the output before torch flattens it, so its classes can be made known in time.
    handle = model.register_forward_hook(lambda _module, _inputs, output: make_known(output))
    try:
        with untouched(model), caches_emptied(model):
            return torch.export.export(
                model, args, kwargs, dynamic_shapes=dynamic_shapes, strict=False
            )
    except Exception as error:  # anything the model's own code may raise
        raise CaptureError(_failure_text(model, error)) from error
    finally:
        handle.remove()


def _alias(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().requires_grad_(tensor.requires_grad)


def _failure_text(model: torch.nn.Module, error: Exception) -> str:
    where = user_line(error)
    at = f" at {where}" if where else ""
    return f"cannot capture {type(model).__name__}: {_reason(error)}{at}; {_REMEDIES}"


def _cause(error: CaptureError) -> str:
    """The reason of a failed attempt, without the remedies: for a note."""
    source = error.__cause__
    if not isinstance(source, Exception):
        return str(error)
    where = user_line(source)
    return _reason(source) + (f" at {where}" if where else "")


def _reason(error: Exception) -> str:
    """What went wrong, in one clause."""
    if type(error).__name__ == "GuardOnDataDependentSymNode":
        return "a value computed from the inputs decides which code runs or how large a tensor is"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    if "Constraints violated" in text and len(lines) > 1:
        text = lines[1].removeprefix("- ").partition(" If you're")[0]
    return f"{type(error).__name__}: {text.rstrip('.')}"


def _check_shared(model: torch.nn.Module, graph: GraphModule) -> None:
    """The graph must hold the model's own parameters: a copy would double the memory."""
    own = {id(p) for p in model.parameters()}
    copied = [name for name, p in graph.named_parameters() if id(p) not in own]
    if copied:
        raise CaptureError(
            f"capture copied the parameter {copied[0]} of {type(model).__name__} instead of "
            "sharing it; remove parametrizations or tensor subclasses from it, or use "
            "torch.compile(model, backend='attn_rewrite')"
        )


def _mode_notes(model: torch.nn.Module) -> Iterator[str]:
    if isinstance(model, GraphModule):  # an exported program: its mode and its hooks are fixed
        return
    if model.training:
        yield "captured in train mode: dropout and batch statistics are active"
    hooked = [name or "the model" for name, m in model.named_modules() if m._forward_hooks]
    if hooked:
        yield f"forward hooks (on {', '.join(hooked[:3])}) were traced into the graph"


def _repeat_notes(inputs: tuple[InputTensor, ...]) -> Iterator[str]:
    first: dict[int, str] = {}
    for item in inputs:
        known = first.setdefault(id(item.tensor), item.name)
        if known != item.name:
            yield f"{item.name}: an input of its own, although the example passes {known} again"
