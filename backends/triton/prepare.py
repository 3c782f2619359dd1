"""From the text of a cascade to sources: everything that depends on no data, kept per process."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from attn_rewrite.backends.triton.autotune import cache_key, remembered
from attn_rewrite.backends.triton.choose import FEW_ROWS, choose_schedule
from attn_rewrite.backends.triton.emit import Source, emit
from attn_rewrite.backends.triton.gradient import Backward, backward_of
from attn_rewrite.backends.triton.packed import extents_by_rank, extents_in
from attn_rewrite.backends.triton.program import Program, read_program
from attn_rewrite.backends.triton.same import Same
from attn_rewrite.backends.triton.schedule import Device, Schedule, from_text
from attn_rewrite.backends.triton.staging import Stage, stages_of
from attn_rewrite.cascade.attention import SoftmaxAttention, as_softmax
from attn_rewrite.cascade.ir import Cascade
from attn_rewrite.cascade.lse import with_lse as with_lse
from attn_rewrite.cascade.text import parse
from attn_rewrite.errors import LowerError
from attn_rewrite.site import Refusal

DROPOUT = "DROPOUT"
_EIGHT_BITS = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8)


@lru_cache(maxsize=512)
def cascade_of(text: str) -> Cascade:
    """The cascade that ``text`` writes down."""
    return parse(text)


@lru_cache(maxsize=512)
def outputs_of(text: str) -> tuple[str, ...]:
    """Names of what an operator gives for a cascade."""
    return with_lse(cascade_of(text)).outputs


@lru_cache(maxsize=512)
def is_softmax(text: str) -> bool:
    """Is the cascade softmax attention?"""
    return as_softmax(cascade_of(text)) is not None


@lru_cache(maxsize=512)
def stages(text: str) -> tuple[Stage, ...]:
    """The kernels of a cascade; `LowerError` where it has none."""
    found = stages_of(with_lse(cascade_of(text)))
    if isinstance(found, Refusal):
        raise LowerError(f"the Triton backend cannot run this cascade: {found.reason}", [found])
    return found


@lru_cache(maxsize=512)
def backward(text: str, wanted: tuple[str, ...]) -> Backward:
    """The backward cascades of a softmax attention; `LowerError` where there are none."""
    form = softmax_form(text)
    found = backward_of(form, wanted)
    if isinstance(found, Refusal):
        raise LowerError(
            f"the Triton backend has no gradient of this attention: {found.reason}", [found]
        )
    return found


def softmax_form(text: str) -> SoftmaxAttention:
    """The softmax attention that ``text`` writes down; `LowerError` for another cascade."""
    form = as_softmax(cascade_of(text))
    if form is None:
        raise LowerError(
            "only softmax attention has a gradient in the Triton backend; this cascade is "
            f"another one:\n{text}"
        )
    return form


def program_of(cascade: Cascade, row: str, along: str) -> Program:
    """The program of a backward cascade: its passes are as few as they get."""
    return _program_of(Same(cascade), row, along)


@lru_cache(maxsize=512)
def _program_of(cascade: Same[Cascade], row: str, along: str) -> Program:
    found = read_program(cascade.value, row, along)
    if isinstance(found, Refusal):
        raise LowerError(found.reason, [found])
    return found


def lanes_of(program: Program, tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Extents of the head dimensions."""
    found: dict[str, int] = {}
    for decl in program.cascade.inputs:
        if decl.name not in tensors:
            continue
        for rank, extent in extents_in(decl, tensors[decl.name].shape):
            if rank in program.roles.lanes:
                found[rank] = int(extent)
    return found


def source_of(
    program: Program,
    tensors: Mapping[str, Tensor],
    schedule: str = "",
    *,
    random: str | None = None,
    name: str = "attention",
) -> Source:
    """The source for operands like ``tensors``; with the schedule chosen where ``schedule`` is
    empty."""
    if schedule:
        chosen = _read_schedule(schedule)
    else:
        chosen = tuned_for(program, tensors) or default_of(program, tensors)
    chosen = widened(chosen, tensors)
    if random != chosen.random:
        chosen = chosen.with_(random=random)
    return emitted(program, chosen, lanes_of(program, tensors), name)


def widened(schedule: Schedule, tensors: Mapping[str, Tensor]) -> Schedule:
    """The schedule that knows which operands are stored in 8 bits."""
    narrow = frozenset(n for n, t in tensors.items() if t.dtype in _EIGHT_BITS)
    return schedule if narrow <= schedule.widen else schedule.with_(widen=schedule.widen | narrow)


_read_schedule = lru_cache(maxsize=128)(from_text)


def default_of(program: Program, tensors: Mapping[str, Tensor]) -> Schedule:
    """The schedule chosen without timing; products of float32 are as torch is set to make them."""
    first, rows = _first(tensors), _rows(program, tensors)
    few = rows if rows is not None and rows <= FEW_ROWS else None
    lanes = tuple(sorted(lanes_of(program, tensors).items()))
    device = device_of(first)
    chosen = _default(Same(program), lanes, first.element_size(), device, few)
    if _mixed(tensors):
        if device.arch == 80:
            chosen = chosen.with_(block_along=min(chosen.block_along, 32))
        elif device.backend == "hip" and few is None and max(dict(lanes).values()) > 64:
            chosen = chosen.with_(block_rows=chosen.block_rows // 2)
    loose = torch.get_float32_matmul_precision() != "highest"
    if loose and device.backend == "cuda" and first.dtype == torch.float32:
        return chosen.with_(precision="tf32")
    return chosen


def _mixed(tensors: Mapping[str, Tensor]) -> bool:
    """Are keys or values of 8 bits made wider for their products?  That takes registers."""
    narrow = {t.dtype in _EIGHT_BITS for n, t in tensors.items() if n in ("Q", "K", "V")}
    return len(narrow) == 2


@lru_cache(maxsize=512)
def _default(
    program: Same[Program],
    lanes: tuple[tuple[str, int], ...],
    item_bytes: int,
    device: Device,
    rows: int | None,
) -> Schedule:
    row = program.value.roles.row
    return choose_schedule(program.value, dict(lanes), item_bytes, device, {row: rows})


def tuned_for(
    program: Program,
    tensors: Mapping[str, Tensor],
    kind: str = "",
    more: Mapping[str, Any] | None = None,
) -> Schedule | None:
    """What `tune` found for this class of shapes on this device; nothing where it never ran.

    ``kind`` and ``more`` as in `tuning_key`.
    """
    first = _first(tensors)
    if not is_tuned_for(first.device) or any(not isinstance(n, int) for n in first.shape):
        return None
    return remembered(tuning_key(program, tensors, kind, more))


def is_tuned_for(device: torch.device) -> bool:
    """Are there results of tuning for such a device?"""
    return device.type == "cuda" and torch.cuda.is_available()


def tuning_key(
    program: Program,
    tensors: Mapping[str, Tensor],
    kind: str = "",
    more: Mapping[str, Any] | None = None,
) -> str:
    """Under which the result of tuning ``program`` for operands like ``tensors`` is kept.

    ``kind`` is what the kernel is beside its program (``varlen``, ``paged``), ``more`` the extents
    that shapes do not show.
    """
    first = _first(tensors)
    found = {**extents_by_rank(program.cascade.inputs, tensors), **(more or {})}
    sizes = tuple((rank, int(extent)) for rank, extent in found.items())
    return _key(Same(program), sizes, f"{first.dtype} {kind}".strip(), device_name(first))


@lru_cache(maxsize=4096)
def _key(
    program: Same[Program], sizes: tuple[tuple[str, int], ...], dtype: str, device: str
) -> str:
    return cache_key(program.value, dict(sizes), dtype, device)


def _first(tensors: Mapping[str, Tensor]) -> Tensor:
    """The operand that stands for the type and the device of all."""
    return next(t for t in tensors.values() if t.is_floating_point() or t.dtype == torch.int8)


def device_name(tensor: Tensor) -> str:
    """The name of the GPU a tensor lies on."""
    return torch.cuda.get_device_name(tensor.device) if tensor.device.type == "cuda" else "cpu"


def processors_of(tensor: Tensor) -> int:
    """Processors (SM, CU) of the GPU a tensor lies on; those of an H100 where there is none."""
    if tensor.device.type != "cuda":
        return 132
    return int(torch.cuda.get_device_properties(tensor.device).multi_processor_count)


def _rows(program: Program, tensors: Mapping[str, Tensor]) -> int | None:
    """The number of rows, where it is not symbolic."""
    row = program.roles.row
    for decl in program.cascade.inputs:
        if decl.name in tensors and row in decl.ranks:
            extent = tensors[decl.name].shape[decl.ranks.index(row)]
            return extent if isinstance(extent, int) else None
    return None


def emitted(program: Program, schedule: Schedule, lanes: Mapping[str, int], name: str) -> Source:
    """The source; emitted once for the same program, schedule and head dimensions."""
    return _source(Same(program), schedule, tuple(sorted(lanes.items())), name)


@lru_cache(maxsize=512)
def _source(
    program: Same[Program], schedule: Schedule, lanes: tuple[tuple[str, int], ...], name: str
) -> Source:
    return emit(program.value, schedule, dict(lanes), name=name)


def device_of(tensor: Tensor) -> Device:
    """The kind of device a tensor lies on; where there is none, what the defaults are made for."""
    return _device(tensor.device)


@lru_cache(maxsize=64)
def _device(device: torch.device) -> Device:
    if device.type != "cuda" or not torch.cuda.is_available():
        return Device()
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return Device("hip", properties.gcnArchName.split(":")[0])
    return Device("cuda", properties.major * 10 + properties.minor)
