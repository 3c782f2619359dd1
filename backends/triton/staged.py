"""Quantised attention on Triton: codes and scales first, then one generated kernel over the codes.

The kernel is that of `core_of`: an ordinary cascade whose operands are stored in 8 bits, so the
emitter needs no case for it.  Products of int8 codes accumulate in int32, of 8-bit floats in
float32; scales enter the score where the placement rule let them stand.  Codes are made in float64,
as the oracle makes them: a code that rounds the other way is an error of a whole step.  Integer
codes of blocks, tokens and channels are made by one kernel an operand (`quantise`), others by torch
operators.  int4 codes of keys and values lie two in a byte (`packed`) and are multiplied as int8,
since no product of Triton takes less.

Probabilities that are rounded are rounded below the maximum of the complete row, as the cascade
says, which takes two passes over the keys.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from attn_rewrite.backends.torch.emit import cast
from attn_rewrite.backends.triton.packed import emit_packed, is_packed, packable
from attn_rewrite.backends.triton.quantise import emit_fused
from attn_rewrite.backends.triton.schedule import Device
from attn_rewrite.cascade.ir import Cascade, TensorDecl
from attn_rewrite.cascade.staged import as_staged, core_of, stages_of
from attn_rewrite.graph import Builder
from attn_rewrite.site import Refusal

_STORED = {
    "i8": torch.int8, "f8e4m3": torch.float8_e4m3fn, "f8e5m2": torch.float8_e5m2,
    "f32": torch.float32,
}  # fmt: skip
# NVIDIA before compute capability 8.9 has no conversions of E4M3, and AMD's CDNA 3 has another
# 8-bit float of the same name (bias 8, no negative zero).
_NO_E4M3 = ("cuda:80", "hip:gfx942")


@dataclass(frozen=True)
class Staged:
    """What runs before the kernel, and the kernel's cascade over stored codes."""

    stages: Cascade
    core: Cascade


def split(cascade: Cascade) -> Staged | None:
    """``cascade`` as stages and a core over codes; None where it has no stages."""
    staged = as_staged(cascade)
    if staged is None or not staged.stages:
        return None
    core = core_of(staged, cascade.name)
    made = {e.out.tensor for e in staged.stages}
    packed = packable((staged.k, staged.v), core.inputs)
    inputs = tuple(_stored(t, packed) if t.name in made else t for t in core.inputs)
    tensors = tuple(replace(t, dtype="i8") if t.dtype == "i4" else t for t in core.tensors)
    return Staged(stages_of(staged), replace(core, inputs=inputs, tensors=tensors))


def _stored(decl: TensorDecl, packed: frozenset[str]) -> TensorDecl:
    """How the result of a stage lies in memory: codes in their type, everything else float32."""
    kind = {"i4": "i4" if decl.name in packed else "i8", "float": "f32"}.get(decl.dtype, decl.dtype)
    return replace(decl, dtype=kind)


def refused(cascade: Cascade, device: Device) -> Refusal | None:
    """Why a target cannot multiply the codes of ``cascade``, or None."""
    staged = as_staged(cascade)
    if staged is None or f"{device.backend}:{device.arch}" not in _NO_E4M3:
        return None
    if not any(t.dtype == "f8e4m3" for t in staged.tensors):
        return None
    return Refusal(
        "triton-fp8",
        f"{device.backend}:{device.arch} has no 8-bit floats with four exponent bits as they are "
        "stored here (E4M3, largest 448); use int8, or fp8(kind='e5m2')",
    )


def emit_codes(
    build: Builder, held: Staged, decls: Sequence[TensorDecl], inputs: Sequence[Any]
) -> list[Any]:
    """The inputs of the core: codes, scales and means made, everything else handed on."""
    named: Mapping[str, Any] = dict(zip((t.name for t in decls), inputs, strict=True))
    made = emit_fused(build, held.stages, {t.name: named[t.name] for t in held.stages.inputs})
    found = []
    for t in held.core.inputs:
        if t.name not in made:
            found.append(named[t.name])
        elif is_packed(t):
            found.append(emit_packed(build, cast(build, made[t.name], torch.int8)))
        else:
            found.append(cast(build, made[t.name], _STORED[t.dtype]))
    return found
