"""From the text of a cascade to sources: everything that depends on no data, kept per process."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import torch
from torch import Tensor

from attn_rewrite.backends.triton.autotune import cache_key, remembered
from attn_rewrite.backends.triton.choose import choose_schedule
from attn_rewrite.backends.triton.emit import Source, emit
from attn_rewrite.backends.triton.gradient import Backward, backward_of
from attn_rewrite.backends.triton.program import Program
from attn_rewrite.backends.triton.schedule import Device, Schedule, from_text
from attn_rewrite.backends.triton.staging import Stage, stages_of
from attn_rewrite.cascade.attention import SoftmaxAttention, as_softmax
from attn_rewrite.cascade.expr import Read, call
from attn_rewrite.cascade.ir import Cascade, Einsum
from attn_rewrite.cascade.text import parse
from attn_rewrite.errors import LowerError
from attn_rewrite.site import Refusal

DROPOUT = "DROPOUT"
LSE = "LSE"
_EIGHT_BITS = ("float8_e4m3fn", "float8_e5m2", "int8")


@lru_cache(maxsize=512)
def cascade_of(text: str) -> Cascade:
    """The cascade that ``text`` writes down."""
    return parse(text)


def with_lse(cascade: Cascade) -> Cascade:
    """A softmax attention that also gives the log-sum-exp of each row, [b, h, q] in float32."""
    if LSE in cascade.outputs or as_softmax(cascade) is None:
        return cascade
    total, top = cascade.producer("SD"), cascade.producer("GM")
    assert total is not None
    assert top is not None
    lse = Einsum(Read(LSE, top.out.index), top.out + call("log", total.out))
    return Cascade(
        cascade.name, cascade.ranks, cascade.inputs, (*cascade.body, lse),
        (*cascade.outputs, LSE), cascade.tensors,
    )  # fmt: skip


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


@lru_cache(maxsize=64)
def program_of(cascade: Cascade, row: str, along: str) -> Program:
    """The program of a backward cascade: its passes are as few as they get."""
    from attn_rewrite.backends.triton.program import read_program

    found = read_program(cascade, row, along)
    if isinstance(found, Refusal):
        raise LowerError(found.reason, [found])
    return found


def lanes_of(program: Program, tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Extents of the head dimensions."""
    found: dict[str, int] = {}
    for decl in program.cascade.inputs:
        if decl.name not in tensors:
            continue
        for rank, extent in zip(decl.ranks, tensors[decl.name].shape, strict=True):
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
    lanes = lanes_of(program, tensors)
    if schedule:
        chosen = from_text(schedule)
    else:
        chosen = _tuned(program, tensors) or default_of(program, tensors, random=random)
    wide = {n for n, t in tensors.items() if str(t.dtype).removeprefix("torch.") in _EIGHT_BITS}
    if wide:
        chosen = chosen.with_(widen=chosen.widen | frozenset(wide))
    return _source(program, chosen, tuple(sorted(lanes.items())), name)


def default_of(
    program: Program, tensors: Mapping[str, Tensor], *, random: str | None = None
) -> Schedule:
    """The schedule chosen without timing."""
    first = _first(tensors)
    return choose_schedule(
        program, lanes_of(program, tensors), first.element_size(), device_of(first),
        {program.roles.row: _rows(program, tensors)}, random=random,
    )  # fmt: skip


def _tuned(program: Program, tensors: Mapping[str, Tensor]) -> Schedule | None:
    """What `tune` found for this class of shapes on this device; nothing where it never ran."""
    first = _first(tensors)
    if first.device.type != "cuda" or not torch.cuda.is_available():
        return None
    if any(not isinstance(n, int) for n in first.shape):
        return None
    sizes = sizes_of(program, tensors)
    return remembered(cache_key(program, sizes, str(first.dtype), device_name(first)))


def _first(tensors: Mapping[str, Tensor]) -> Tensor:
    """The operand that stands for the type and the device of all."""
    return next(t for t in tensors.values() if t.is_floating_point() or t.dtype == torch.int8)


def sizes_of(program: Program, tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Extents of the ranks of the operands; a dimension of one broadcasts."""
    found: dict[str, int] = {}
    for decl in program.cascade.inputs:
        if decl.name in tensors:
            for rank, extent in zip(decl.ranks, tensors[decl.name].shape, strict=True):
                found[rank] = max(int(extent), found.get(rank, 1))
    return found


def device_name(tensor: Tensor) -> str:
    """The name of the GPU a tensor lies on."""
    return torch.cuda.get_device_name(tensor.device) if tensor.device.type == "cuda" else "cpu"


def _rows(program: Program, tensors: Mapping[str, Tensor]) -> int | None:
    """The number of rows, where it is not symbolic."""
    row = program.roles.row
    for decl in program.cascade.inputs:
        if decl.name in tensors and row in decl.ranks:
            extent = tensors[decl.name].shape[decl.ranks.index(row)]
            return extent if isinstance(extent, int) else None
    return None


@lru_cache(maxsize=512)
def _source(
    program: Program, schedule: Schedule, lanes: tuple[tuple[str, int], ...], name: str
) -> Source:
    return emit(program, schedule, dict(lanes), name=name)


def device_of(tensor: Tensor) -> Device:
    """The kind of device a tensor lies on; where there is none, what the defaults are made for."""
    if tensor.device.type != "cuda" or not torch.cuda.is_available():
        return Device()
    properties = torch.cuda.get_device_properties(tensor.device)
    if torch.version.hip:
        return Device("hip", properties.gcnArchName.split(":")[0])
    return Device("cuda", properties.major * 10 + properties.minor)
