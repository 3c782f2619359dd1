"""What an exported file is compared with: the program itself, in its own types and in float64.

The two runs give the bound for ONNX Runtime's error: twice what the program itself is off, or the
rounding that as many contractions may add up to, whichever is more.  Where the program rounds to
codes a third run shows what another rounding of near ties does, which no runtime can be held to.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind
from torch.utils import _pytree as pytree

from attn_rewrite.backends.onnx.evaluation import Evaluation, widened
from attn_rewrite.backends.onnx.names import (
    input_name,
    input_values,
    is_encoded,
    is_past,
    output_names,
    sizes_of,
)

Arrays = dict[str, np.ndarray[Any, Any]]
_CONTRACTIONS = ("mm", "bmm", "addmm", "baddbmm", "matmul", "linear", "einsum", "convolution")
_ATTENTIONS = (
    "scaled_dot_product_attention", "tiled_attention", "tiled_attention_lse", "mapped_attention",
)  # fmt: skip
_FORWARDS = ("alias", "clone", "detach", "contiguous")
CONSTANT_KINDS = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)


@dataclass(frozen=True)
class Expected:
    """Outputs by name in float64, and the error allowed for each.

    ``appended`` are the present keys and values that were replaced by given ones, as computed.
    """

    outputs: Arrays
    bounds: Mapping[str, float]
    appended: Arrays = field(default_factory=dict)


def _arguments(program: ExportedProgram, inputs: Mapping[str, Any], wide: bool) -> Iterator[Any]:
    """The graph's arguments in order: weights and constants, and the user's values by name."""
    signature, constants = program.graph_signature, program.constants
    for spec in signature.input_specs:
        if isinstance(spec.arg, ConstantArgument):
            yield spec.arg.value
        elif spec.kind == InputKind.USER_INPUT:
            value = inputs[input_name(spec.arg.name)]
            value = torch.as_tensor(value) if isinstance(value, np.ndarray) else value
            yield widened(value) if wide else value
        elif spec.target in program.state_dict:
            yield program.state_dict[spec.target]
        else:
            yield constants[spec.target]


@dataclass(frozen=True)
class _Run:
    """Outputs by name, what the held ones were, and what every ``round`` was given by node."""

    outputs: Arrays
    appended: Arrays
    rounded: Mapping[str, torch.Tensor]


def _run(
    program: ExportedProgram,
    inputs: Mapping[str, Any],
    wide: bool,
    held: Arrays | None = None,
    slack: Mapping[str, float] | None = None,
) -> _Run:
    """One run; ``held`` are outputs by name that are taken as given."""
    nodes = _made_by(program) if held else {}
    given = {nodes[name]: torch.as_tensor(array) for name, array in (held or {}).items()}
    evaluation = Evaluation(program, wide, given, slack or {})
    with torch.no_grad():
        results = evaluation.run(*_arguments(program, inputs, wide))
    specs = program.graph_signature.output_specs
    kept = [
        result
        for result, spec in zip(pytree.tree_leaves(results), specs, strict=True)
        if spec.kind == OutputKind.USER_OUTPUT and not isinstance(spec.arg, ConstantArgument)
    ]
    named = zip(output_names(program), kept, strict=True)
    outputs = {name: _array(value) for name, value in named}
    before = {name: _array(evaluation.seen[nodes[name]]) for name in held or ()}
    return _Run(outputs, before, evaluation.rounded)


def _made_by(program: ExportedProgram) -> dict[str, str]:
    """The node that makes every output, what only forwards it left out."""
    nodes = {n.name: n for n in program.graph.nodes}
    made = {}
    for name, spec in zip(output_names(program), _tensor_outputs(program), strict=True):
        node = nodes[spec.arg.name]
        while (before := _forwarded(node)) is not None:
            node = before
        made[name] = node.name
    return made


def _forwarded(node: torch.fx.Node) -> torch.fx.Node | None:
    """The one value that ``node`` only hands on; None where it computes something.

    A cache that is rebuilt where it is returned is appended to an empty one: that is no new value.
    """
    name = str(getattr(node.target, "_opname", ""))
    if name in _FORWARDS:
        return node.all_input_nodes[0]
    joined = list(node.args[0]) if name == "cat" else []  # type: ignore[arg-type]
    parts = [part for part in joined if not _is_empty(part)]
    return parts[0] if len(parts) == 1 else None


def _is_empty(node: torch.fx.Node) -> bool:
    """Whether a tensor has no elements at any size (torch lets [0] stand for it in ``cat``)."""
    return any(isinstance(n, int) and n == 0 for n in sizes_of(node.meta.get("val")))


def _tensor_outputs(program: ExportedProgram) -> list[Any]:
    return [
        s
        for s in program.graph_signature.output_specs
        if s.kind == OutputKind.USER_OUTPUT and not isinstance(s.arg, ConstantArgument)
    ]


def own_outputs(program: ExportedProgram, inputs: Mapping[str, Any]) -> Arrays:
    """What ``program`` gives on ``inputs`` in its own types."""
    return _run(program, inputs, False).outputs


def _array(value: Any) -> np.ndarray[Any, Any]:
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        value = (value.float() if value.dtype == torch.bfloat16 else value).numpy()
    plain: np.ndarray[Any, Any] = np.asarray(value)
    return plain


def _contractions(program: ExportedProgram) -> int:
    names = [str(getattr(n.target, "_opname", "")) for n in program.graph.nodes]
    return sum(n in _CONTRACTIONS for n in names) + 2 * sum(n in _ATTENTIONS for n in names)


def _allowed(
    own: np.ndarray[Any, Any], wide: np.ndarray[Any, Any], depth: int, eps: float
) -> float:
    """``max(2 x own error, 4 eps x sqrt(contractions) x max|reference|)``."""
    if not wide.size:
        return 0.0
    finite = np.isfinite(wide) & np.isfinite(own)
    with np.errstate(invalid="ignore"):  # -inf of a row without keys in both: left out
        apart = np.abs(own.astype(np.float64) - wide)
    error = np.max(apart, where=finite, initial=0.0)
    size = np.max(np.abs(wide), where=finite, initial=0.0)
    # Rounding errors of independent contractions add up like a random walk.
    return float(max(2 * error, 4 * eps * math.sqrt(max(depth, 1)) * size))


def expected(
    program: ExportedProgram, inputs: Mapping[str, Any], held: Arrays | None = None
) -> Expected:
    """What ``program`` gives on ``inputs`` (by the file's names), and how far off a file may be.

    ``held`` gives outputs that are taken as they are, in all that is computed from them: the
    numbers of a file's codes, which a rounding may turn to either side.
    """
    own, wide = (_run(program, inputs, w, held) for w in (False, True))
    depth, turns = _contractions(program), _effect_of_ties(program, inputs, held, own, wide)
    outputs: Arrays = {}
    bounds: dict[str, float] = {}
    for name, dtype in _output_types(program).items():
        floating = dtype is not None and dtype.is_floating_point
        # An integer (an argmax) may differ in float64 where it is a near tie: it has to be the own.
        outputs[name] = wide.outputs[name] if floating else own.outputs[name]
        eps = torch.finfo(dtype).eps if floating and dtype is not None else 0.0
        near, far = (r.appended if name in wide.appended else r.outputs for r in (own, wide))
        allowed = _allowed(near[name], far[name], depth, eps) if floating else 0.0
        bounds[name] = allowed + turns.get(name, 0.0)
    return Expected(outputs, bounds, wide.appended)


def _effect_of_ties(
    program: ExportedProgram,
    inputs: Mapping[str, Any],
    held: Arrays | None,
    own: _Run,
    wide: _Run,
) -> dict[str, float]:
    """What rounding near ties to their other side changes in every output, twice.

    A tie is near where the program's own error may turn it.  All are turned in one run: some of
    what they do may cancel, hence twice.  Empty where the program rounds nothing.
    """
    slack = {n: _slack(own.rounded[n], given) for n, given in wide.rounded.items()}
    if not slack:
        return {}
    turned = _run(program, inputs, True, held, slack).outputs
    return {
        name: 2 * float(np.max(np.abs(turned[name] - array), initial=0.0))
        for name, array in wide.outputs.items()
        if array.dtype.kind == "f" and np.isfinite(array).all()
    }


def _slack(own: torch.Tensor, wide: torch.Tensor) -> float:
    """How far from a tie a value may be and still be rounded to the other side."""
    eps = torch.finfo(own.dtype).eps if own.dtype.is_floating_point else 0.0
    return _allowed(_array(own), _array(wide), 1, eps)


def _output_types(program: ExportedProgram) -> dict[str, torch.dtype | None]:
    """Element types of the outputs by name; None for plain numbers."""
    nodes = {n.name: n for n in program.graph.nodes}
    kept = [getattr(nodes[s.arg.name].meta["val"], "dtype", None) for s in _tensor_outputs(program)]
    return dict(zip(output_names(program), kept, strict=True))


def example_inputs(
    program: ExportedProgram, switches: Collection[tuple[str, int]] = ()
) -> tuple[dict[str, Any], ...]:
    """The program's example inputs, and where axes are dynamic the same at other sizes.

    The second set has one more example in the batch and two thirds of the length, made by repeating
    and cutting the first.  A step with a cache is there without a past, and with one new token, as
    well.  So is a set on the other side of every one of ``switches`` (the symbol of a length, and a
    number up to which a file runs something else) that none of the others reaches, unless the
    program has no such length.  Empty where the program holds no example inputs.
    """
    if program.example_inputs is None:
        return ()
    leaves = pytree.tree_leaves(program.example_inputs, is_leaf=lambda x: x is None)
    specs = [s for s in program.graph_signature.input_specs if s.kind == InputKind.USER_INPUT]
    given = {
        input_name(s.arg.name): leaf
        for s, leaf in zip(specs, leaves, strict=True)
        if not isinstance(s.arg, ConstantArgument)
    }
    traced = input_values(program)
    other = _other_sizes(program, traced, given)
    if not other:
        return (given,)
    beyond = _across(other, _own_sizes(traced, given), switches)
    first, *runs = (
        {n: _resized(traced[n], value, at) for n, value in given.items()} for at in (other, *beyond)
    )
    return (given, first, *(run for run in runs if _is_served(program, run)), *_steps(given))


def _is_served(program: ExportedProgram, inputs: Mapping[str, Any]) -> bool:
    """Whether ``program`` itself takes inputs of these sizes: a table of positions may end before,
    and a program does not say so in its ranges."""
    try:
        own_outputs(program, inputs)
    except (IndexError, RuntimeError):
        return False
    return True


def _own_sizes(traced: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, int]:
    """What every symbol is in the example."""
    found: dict[str, int] = {}
    for name, value in traced.items():
        for axis, size in enumerate(sizes_of(value)):
            found.setdefault(str(size), given[name].shape[axis])
    return found


def _across(
    other: Mapping[Any, int],
    own: Mapping[str, int],
    switches: Collection[tuple[str, int]],
) -> Iterator[dict[Any, int]]:
    """Sizes beyond every switch, or at it, where the known ones are all on one side."""
    for symbol, switch in sorted(set(switches)):
        at = next((e for e in other if str(e) == symbol), None)
        if at is None:
            continue
        above = {own[symbol] > switch, other[at] > switch}
        if len(above) == 1:
            yield {**other, at: switch if above.pop() else switch + 1}


def _other_sizes(
    program: ExportedProgram, traced: Mapping[str, Any], given: Mapping[str, Any]
) -> dict[Any, int]:
    """Another size for every symbol, within the program's range."""
    sizes: dict[Any, int] = {}
    for name, value in traced.items():
        for axis, size in enumerate(sizes_of(value)):
            expression = size.node.expr if isinstance(size, torch.SymInt) else None
            if expression is None or not expression.is_symbol or expression in sizes:
                continue
            now = given[name].shape[axis]
            wanted = now + 1 if axis == 0 else max(1, now * 2 // 3)
            allowed = program.range_constraints.get(expression)
            if allowed is not None and wanted < allowed.lower:
                wanted = int(allowed.lower)
            if allowed is not None and wanted > allowed.upper:  # the upper bound may be infinite
                wanted = int(allowed.upper)
            sizes[expression] = wanted
    return sizes | _total(traced, sizes)


def _total(traced: Mapping[str, Any], sizes: Mapping[Any, int]) -> dict[Any, int]:
    """The length of a mask over past and new tokens, where the program holds it for a size of its
    own."""
    past = next((v.shape[2] for n, v in traced.items() if is_past(n)), None)
    own = "decoder_" if any(map(is_encoded, traced)) else ""
    tokens, held = f"{own}input_ids", f"{own}attention_mask"
    if past is None or held not in traced or tokens not in traced:
        return {}
    parts = (past, traced[tokens].shape[1])
    total = sum(n if isinstance(n, int) else int(n.node.expr.subs(sizes)) for n in parts)
    mask = traced[held].shape[1]
    free = isinstance(mask, torch.SymInt) and mask.node.expr.is_symbol
    return {mask.node.expr: total} if free else {}


def _steps(given: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The first call, without a past, and a later one of a single token."""
    past = next((v.shape[2] for n, v in given.items() if is_past(n)), None)
    if past is None:
        return
    own = "decoder_" if any(map(is_encoded, given)) else ""
    mask, tokens = f"{own}attention_mask", (f"{own}input_ids", f"{own}position_ids")
    kept = {n: v[:, :, :0] if is_past(n) else v for n, v in given.items()}
    if mask in given:
        kept[mask] = given[mask][:, past:]
    yield kept
    one = {n: v[..., :1] if n in tokens else v for n, v in given.items()}
    if mask in given:
        one[mask] = given[mask][:, : past + 1]
    yield one


def _resized(traced: Any, value: Any, sizes: Mapping[Any, int]) -> Any:
    """``value`` with its dynamic axes cut, or continued from their start."""
    if not isinstance(traced, torch.Tensor):
        return sizes.get(traced.node.expr, value) if isinstance(traced, torch.SymInt) else value
    for axis, size in enumerate(sizes_of(traced)):
        if isinstance(size, torch.SymInt):
            wanted = int(size.node.expr.subs(sizes))
            index = torch.arange(wanted) % value.shape[axis]
            value = value.index_select(axis, index)
    return value


def as_arrays(inputs: Mapping[str, Any]) -> Arrays:
    """Inputs as ONNX Runtime takes them."""
    return {name: _array(value) for name, value in inputs.items()}
