"""Calling a generated kernel: its arguments from tensors, its grid, its outputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from attn_rewrite.backends.triton.build import is_interpreted, kernel_of
from attn_rewrite.backends.triton.emit import Source
from attn_rewrite.backends.triton.frame import Parameter
from attn_rewrite.backends.triton.interpreted import exact_conversions
from attn_rewrite.backends.triton.packed import extents_by_rank
from attn_rewrite.backends.triton.schedule import least_side, padded_side
from attn_rewrite.errors import LowerError, ToolError

Launch = Callable[..., Any]


@dataclass(frozen=True, eq=False)
class Call:
    """Everything one launch needs besides the source.

    ``tensors`` by name: inputs, outputs, and the tables of lists, pages and sequences; ``ranks``
    the dimensions of each; ``extents`` of every rank; ``special`` numbers by argument name.
    """

    tensors: Mapping[str, Tensor]
    ranks: Mapping[str, Sequence[str]]
    extents: Mapping[str, Any]
    special: Mapping[str, Any] = field(default_factory=dict)


def grid_of(source: Source, call: Call, splits: int = 1) -> tuple[Any, ...]:
    """Programs: row blocks times the extents of the grid ranks, and parts of a split rank."""
    roles, schedule = source.program.roles, source.schedule
    rows = call.extents[roles.row] * schedule.pack
    blocks = (rows + schedule.block_rows - 1) // schedule.block_rows
    count = blocks
    for rank in roles.grid:
        extent = call.extents[rank]
        count = count * (extent // schedule.pack if rank == "h" else extent)
    return (count, splits) if schedule.split else (count,)


def arguments(source: Source, call: Call) -> dict[str, Any]:
    """The value of every argument of the kernel, by name."""
    return {p.name: _argument(source, call, p) for p in source.parameters}


def _argument(source: Source, call: Call, p: Parameter) -> Any:
    if p.kind == "pointer":
        return call.tensors[p.tensor]
    if p.kind == "stride":
        return stride_of(call.tensors[p.tensor], call.ranks[p.tensor], p.rank, call.extents)
    if p.kind == "extent":
        return call.extents[p.rank]
    if p.kind == "lane":
        extent = call.extents[p.rank]
        least = least_side(source.schedule, source.program.cascade.inputs)
        return padded_side(extent, least) if p.name.startswith("BLOCK_") else extent
    return _constant(source, call, p)


def _constant(source: Source, call: Call, p: Parameter) -> Any:
    schedule = source.schedule
    if p.name == "PRECISION":
        return schedule.precision
    if p.rank == source.program.roles.row:
        return schedule.block_rows
    if p.rank == source.program.roles.along:
        return schedule.block_along
    return call.special[p.name]


def stride_of(tensor: Tensor, ranks: Sequence[str], rank: str, extents: Mapping[str, Any]) -> Any:
    """Elements between neighbours along ``rank``; 0 where a dimension of one broadcasts."""
    place = list(ranks).index(rank)
    broadcast = isinstance(tensor.shape[place], int) and tensor.shape[place] == 1
    return 0 if broadcast and extents.get(rank, 1) != 1 else tensor.stride(place)


def launch(source: Source, call: Call, splits: int = 1, *, wrap: bool = False) -> None:
    """Run the kernel on the tensors of ``call``; outputs are written in place.

    ``wrap``: launch through `torch.library.wrap_triton`, so that tracers see the kernel.
    """
    grid = grid_of(source, call, splits)
    if isinstance(grid[0], int) and math.prod(grid) == 0:
        return
    kernel = kernel_of(source)
    if is_interpreted(kernel):
        _interpret(kernel, grid, source, call)
        return
    target = torch.library.wrap_triton(kernel) if wrap else kernel
    schedule = source.schedule
    options = {"num_warps": schedule.warps, "num_stages": schedule.stages}
    with _current(next(iter(call.tensors.values())).device), _one_sentence(source):
        target[grid](**arguments(source, call), **options)


def _current(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device, whichever the operands are on."""
    if device.type != "cuda" or torch.cuda.device_count() < 2:
        return nullcontext()
    return torch.cuda.device(device)


@contextmanager
def _one_sentence(source: Source) -> Iterator[None]:
    """What Triton says of a kernel that it cannot compile, or a GPU cannot hold, as `ToolError`."""
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources

    try:
        yield
    except (CompilationError, OutOfResources) as error:
        raise ToolError(
            f"{source.name} ({source.schedule.block_rows} x {source.schedule.block_along} tiles) "
            f"cannot run on this GPU: {last_line(error)}", stage="triton launch",
        ) from error  # fmt: skip


def last_line(error: Exception) -> str:
    """The last line of a message, which says what is wrong; those before show where."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else repr(error))[:500]


def _interpret(kernel: Any, grid: tuple[Any, ...], source: Source, call: Call) -> None:
    """Run in Triton's interpreter, which has no products of bfloat16: they are float32 there."""
    wide = {n: t.float() for n, t in call.tensors.items() if t.dtype == torch.bfloat16}
    with exact_conversions():
        kernel[grid](**arguments(source, replace(call, tensors={**call.tensors, **wide})))
    for output in source.outputs:
        if output.name in wide:
            call.tensors[output.name].copy_(wide[output.name])


def extents_of(
    source: Source, tensors: Mapping[str, Tensor], more: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Extents of all ranks from the inputs; a dimension of one broadcasts if another is larger."""
    found = {**extents_by_rank(source.program.cascade.inputs, tensors), **(more or {})}
    for rank in (source.program.roles.row, source.program.roles.along):
        if rank not in found:
            raise LowerError(f"no input of {source.program.cascade.name} has the rank {rank}")
    return found


def check_device(tensors: Sequence[Tensor]) -> None:
    """`LowerError` unless kernels can run on the device of the tensors, which is one."""
    import triton

    device = tensors[0].device
    if device.type != "cuda" and not triton.knobs.runtime.interpret:
        raise LowerError(
            f"Triton kernels run on an NVIDIA or AMD GPU, and the operands are on {device}; use "
            "backend='torch' here, or compile ahead of time with --export triton:cuda:90"
        )
    other = next((t.device for t in tensors if t.device != device), None)
    if other is not None:
        raise LowerError(
            f"operands of a Triton kernel are on {device} and on {other}; move them to one device"
        )


def without_gradients(name: str, inputs: Mapping[str, Tensor]) -> None:
    """`LowerError` where autograd would record a function that has no gradient."""
    asked = [n for n, t in inputs.items() if t.requires_grad]
    if asked and torch.is_grad_enabled():
        raise LowerError(
            f"{name} has no gradient, and {asked[0]} requires one; call it under torch.no_grad(), "
            "or train with attn_rewrite::triton_cascade"
        )


def result_dtype(operands: Iterable[Tensor]) -> torch.dtype:
    """The type of outputs with a head dimension: of the first floating operand wider than 8 bits.

    bfloat16 where all have 8 bits: a result rounded to 8 bits is of no use.
    """
    floating = [t.dtype for t in operands if t.is_floating_point()]
    wide = next((d for d in floating if d.itemsize > 1), None)
    return wide or (torch.bfloat16 if floating else torch.float32)


def run(
    source: Source,
    inputs: Mapping[str, Tensor],
    dtypes: Mapping[str, torch.dtype] | None = None,
    *,
    tables: Mapping[str, Tensor] | None = None,
    extents: Mapping[str, Any] | None = None,
    special: Mapping[str, Any] | None = None,
    splits: int = 1,
    wrap: bool = False,
) -> dict[str, Tensor]:
    """Allocate the outputs of ``source``, launch it, and return them by name.

    ``inputs`` have the declared ranks as dimensions, any strides.  Outputs with a head dimension
    have the type of `result_dtype`, others float32; ``dtypes`` says otherwise.
    ``tables`` are the lists of tiles (``tiles [b, h, blocks, 3]``, ``columns``).
    """
    sizes = extents_of(source, inputs, extents)
    first, narrow = next(iter(inputs.values())), result_dtype(inputs.values())
    ranks = {t.name: t.ranks for t in source.program.cascade.inputs}
    ranks["tiles"] = ("b", "h", "blocks", "place")
    outputs = {}
    lanes = set(source.program.roles.lanes)
    for o in source.outputs:
        shape = [sizes[r] for r in o.ranks]
        ranks[o.name] = o.ranks
        if source.schedule.split:
            shape, ranks[o.name] = [splits, *shape], ("split", *o.ranks)
        wide = source.schedule.split or not lanes & set(o.ranks)
        kind = (dtypes or {}).get(o.name, torch.float32 if wide else narrow)
        if source.program.roles.along in o.ranks:
            outputs[o.name] = torch.full(shape, o.default, dtype=kind, device=first.device)
        else:
            outputs[o.name] = torch.empty(shape, dtype=kind, device=first.device)
    call = Call({**inputs, **(tables or {}), **outputs}, ranks, sizes, special or {})
    launch(source, call, splits, wrap=wrap)
    return outputs
