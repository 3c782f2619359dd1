"""Which dimensions of a model's inputs are a batch and which a sequence.

The guess is made from ranks, sizes and argument names only.  Capture asks `torch.export` to keep
the guessed dimensions dynamic *where the model allows*, so a wrong guess costs generality (and is
stated), never numbers.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from attn_rewrite.tracing import frame_text, is_user_code

BATCH = "batch"
SEQUENCE = "sequence"

_MASK = re.compile(r"mask|bias")
_CACHE = re.compile(r"past|cache")
_QKV = re.compile(r"(^|[._])(q|k|v|query|key|value)s?(_states?)?$")


@dataclass(frozen=True, eq=False)
class InputTensor:
    """A tensor among the example inputs and the path it is passed at (``past.layers[0].keys``)."""

    name: str
    tensor: torch.Tensor


def named_tensors(
    forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[InputTensor, ...]:
    """The tensors in ``args`` and ``kwargs`` by the argument of ``forward`` they reach.

    Raises `TypeError` when the arguments do not fit the signature.
    """
    signature = inspect.signature(forward)
    signature.bind(*args, **kwargs)
    leaves: list[InputTensor] = []
    for name, value in [
        *zip(_positional_names(signature, len(args)), args, strict=True),
        *kwargs.items(),
    ]:
        for path, leaf in pytree.tree_flatten_with_path(value)[0]:
            if isinstance(leaf, torch.Tensor):
                leaves.append(InputTensor(name + pytree.keystr(path), leaf))
    return tuple(leaves)


def _positional_names(signature: inspect.Signature, count: int) -> list[str]:
    names: list[str] = []
    for parameter in signature.parameters.values():
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            names += [f"{parameter.name}[{i}]" for i in range(count - len(names))]
        elif parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
            names.append(parameter.name)
    return names[:count]


def guess_axes(inputs: Iterable[InputTensor]) -> dict[str, dict[int, str]]:
    """Input name -> {dimension: "batch" | "sequence"}.

    Rank 2 is [B, S] (a square mask [Sq, Skv], position ids [S, 3]); rank 3 is [B, S, D] (a mask
    [B, Sq, Skv]); rank 4 is [B, ...], with sequences at dimensions 2 and 3 of a mask
    [B, H | 1, Sq, Skv], at 2 of a cache [B, H, S, D], and at 2 or 1 of q, k, v where a mask or
    another input shows the length.
    """
    tensors = tuple(inputs)
    lengths = frozenset(size for item in tensors for size in _shown_lengths(item))
    batches = _shown_batches(tensors)
    rules = {1: _vector_axes, 2: _matrix_axes, 3: _cube_axes, 4: _heads_axes}
    guess: dict[str, dict[int, str]] = {}
    for item in tensors:
        rule = rules.get(item.tensor.dim())
        higher = {0: BATCH} if item.tensor.dim() > 4 else {}
        guess[item.name] = rule(item, lengths, batches) if rule else higher
    return guess


def _mask(item: InputTensor) -> bool:
    return item.tensor.dtype == torch.bool or _MASK.search(item.name.lower()) is not None


def _shown_batches(tensors: tuple[InputTensor, ...]) -> frozenset[int]:
    """The sizes shown to be batches, by hidden states, images and token ids where there are any."""
    rows = [item for item in tensors if item.tensor.dim() > 1 and not _mask(item)]
    sure = [i for i in rows if i.tensor.dim() > 2 or not i.tensor.is_floating_point()]
    return frozenset(item.tensor.shape[0] for item in sure or rows)


def _shown_lengths(item: InputTensor) -> tuple[int, ...]:
    """The sizes that ``item`` shows to be sequence lengths."""
    shape = tuple(item.tensor.shape)
    if len(shape) == 4:
        return shape[2:] if _mask(item) else ()
    return (shape[1],) if len(shape) in (2, 3) else ()


def _vector_axes(
    item: InputTensor, lengths: frozenset[int], batches: frozenset[int]
) -> dict[int, str]:
    size = item.tensor.shape[0]
    if size in batches or not batches:
        return {0: BATCH}
    return {0: SEQUENCE} if size in lengths else {}


def _matrix_axes(
    item: InputTensor, lengths: frozenset[int], batches: frozenset[int]
) -> dict[int, str]:
    rows, columns = item.tensor.shape
    square_mask = _mask(item) and rows == columns
    shared = bool(batches) and rows not in batches and (square_mask or rows in lengths)
    return {0: SEQUENCE if shared else BATCH, 1: SEQUENCE}


def _cube_axes(
    item: InputTensor, lengths: frozenset[int], batches: frozenset[int]
) -> dict[int, str]:
    mask = _mask(item) and item.tensor.shape[2] in lengths
    return {0: BATCH, 1: SEQUENCE, **({2: SEQUENCE} if mask else {})}


def _heads_axes(
    item: InputTensor, lengths: frozenset[int], batches: frozenset[int]
) -> dict[int, str]:
    shape = item.tensor.shape
    name = item.name.lower()
    if _mask(item):
        return {0: BATCH, **{d: SEQUENCE for d in (2, 3) if shape[d] in lengths and shape[d] > 1}}
    if _CACHE.search(name):
        return {0: BATCH, 2: SEQUENCE}
    if _QKV.search(name):
        return {0: BATCH, **{d: SEQUENCE for d in (2, 1) if shape[d] in lengths}}
    return {0: BATCH}


@dataclass(frozen=True)
class DynamicDim:
    """A dimension that stayed dynamic: of which input, which one, and what it is."""

    name: str
    dim: int
    role: str  # batch | sequence | given (the caller's dynamic_shapes)
    symbol: str
    upper: int | None


def describe(
    program: ExportedProgram, inputs: tuple[InputTensor, ...], asked: Mapping[str, dict[int, str]]
) -> tuple[tuple[DynamicDim, ...], tuple[str, ...]]:
    """The dimensions that are dynamic in ``program``, and a sentence per input: what is, what is
    not although ``asked``, and why.

    Raises `ValueError` when the program has not the tensor inputs ``inputs``.
    """
    reasons = _specialisations(program)
    dynamic: list[DynamicDim] = []
    sentences: list[str] = []
    for item, shape in zip(inputs, _traced_shapes(program), strict=True):
        roles = asked.get(item.name, {})
        kept = _dynamic_dims(program, item.name, shape, roles)
        dynamic += kept
        sentences.append(_sentence(item, kept, roles, reasons))
    return tuple(dynamic), tuple(sentences)


def _traced_shapes(program: ExportedProgram) -> list[torch.Size]:
    """Shapes of the tensor inputs, in the order they are passed."""
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    names = [name for name in program.graph_signature.user_inputs if isinstance(name, str)]
    values = [nodes[name].meta.get("val") for name in names if name in nodes]
    return [value.shape for value in values if isinstance(value, torch.Tensor)]


def _dynamic_dims(
    program: ExportedProgram, name: str, shape: torch.Size, roles: dict[int, str]
) -> list[DynamicDim]:
    dims: list[DynamicDim] = []
    sizes: tuple[Any, ...] = tuple(shape)
    for dim, size in enumerate(sizes):
        if isinstance(size, torch.SymInt) and size.node.expr.free_symbols:
            bounds = program.range_constraints.get(size.node.expr)
            upper = getattr(bounds, "upper", None)
            limit = int(upper) if upper is not None and upper.is_Integer else None
            dims.append(DynamicDim(name, dim, roles.get(dim, "given"), str(size), limit))
    return dims


def _sentence(
    item: InputTensor,
    kept: list[DynamicDim],
    roles: dict[int, str],
    reasons: Mapping[tuple[str, int], str],
) -> str:
    """``input_ids: batch and sequence (up to 512) are dynamic``, or why a dimension is not."""
    words = list(dict.fromkeys(_dim_word(d) for d in kept))
    shape = "x".join(str(size) for size in item.tensor.shape) or "scalar"
    moves = f"{' and '.join(words)} {'are' if len(words) > 1 else 'is'} dynamic"
    parts = [moves if words else f"static {shape}"]
    moving = {d.dim for d in kept}
    if words and item.tensor.dim() > 3:
        rest = [str(n) for d, n in enumerate(item.tensor.shape) if d not in moving | set(roles)]
        parts += [f"the other sizes are static ({'x'.join(rest)})"] if rest else []
    parts += [
        _static_clause(item, dim, reasons)
        for dim, role in roles.items()
        if dim not in moving and role != "given"
    ]
    return f"{item.name}: {'; '.join(parts)}"


def _dim_word(dim: DynamicDim) -> str:
    word = dim.role if dim.role != "given" else f"dimension {dim.dim}"
    return word + (f" (up to {dim.upper})" if dim.upper is not None else "")


def _static_clause(item: InputTensor, dim: int, reasons: Mapping[tuple[str, int], str]) -> str:
    size = item.tensor.shape[dim]
    why = "the example has this size, which cannot be dynamic" if size <= 1 else ""
    why = reasons.get((item.name, dim)) or why or "the model's operators fix it"
    return f"dimension {dim} is static {size}, because {why}"


def _specialisations(program: ExportedProgram) -> dict[tuple[str, int], str]:
    """(input, dimension) -> the model's line that turned it into a constant, where recorded."""
    fake = next((n.meta["val"] for n in program.graph.nodes if "val" in n.meta), None)
    env = getattr(getattr(fake, "fake_mode", None), "shape_env", None)
    reasons: dict[tuple[str, int], str] = {}
    for symbol, place in getattr(env, "replacements_slocs", {}).items():
        frame = place.framework_loc
        if frame is None or not is_user_code(frame.filename):
            continue
        for source in getattr(env, "var_to_sources", {}).get(symbol, ()):
            if getattr(source, "idx", None) is not None:
                key = (_source_name(source.base), source.idx)
                reasons[key] = f"the model compares it at {frame_text(frame)}"
    return reasons


def _source_name(base: Any) -> str:
    """torch's ``L['past']['k'][0]`` as the path of `named_tensors`, ``past['k'][0]``."""
    name = base.name() if callable(base.name) else base.name
    root, _, rest = str(name).removeprefix("L['").partition("']")
    return root + rest
