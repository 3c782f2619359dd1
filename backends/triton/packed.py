"""Codes of four bits, two in a byte: what operands of the type ``i4`` are for a kernel.

The last dimension is packed as `pack_int4` does it: even positions in the low half of a byte, 8
added to each code.  A kernel loads the byte of every position and takes its half, so a tile costs
half the bytes of memory; products of matrices take 8 bits.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch

from attn_rewrite.backends.torch.emit import value_of
from attn_rewrite.cascade.ir import TensorDecl
from attn_rewrite.graph import Builder, aten
from attn_rewrite.passes.quantize.packing import OFFSET

DTYPE = "i4"
_EACH = 2  # codes in a byte
NOTHING = OFFSET << 4 | OFFSET  # a byte of zeros


def is_packed(decl: TensorDecl) -> bool:
    """Does a kernel read two codes of ``decl`` from a byte?"""
    return decl.dtype == DTYPE


def extents_in(decl: TensorDecl, shape: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    """Ranks of ``decl`` and their extents by ``shape``; not the packed one, which it rounds."""
    ranks = decl.ranks[:-1] if is_packed(decl) else decl.ranks
    return zip(ranks, shape[: len(ranks)], strict=True)


def extents_by_rank(decls: Sequence[TensorDecl], tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Extents of the ranks of operands, by name; a dimension of one broadcasts."""
    found: dict[str, Any] = {}
    for decl in decls:
        if decl.name not in tensors:
            continue
        for rank, extent in extents_in(decl, tensors[decl.name].shape):
            have = found.get(rank)
            if have is None or (isinstance(have, int) and have == 1):
                found[rank] = extent
    return found


def packable(names: Collection[str], inputs: Sequence[TensorDecl]) -> frozenset[str]:
    """Which of the operands ``names`` may be packed: an input beside them has the last rank."""
    known = {r for t in inputs if t.name not in names for r in t.ranks}
    return frozenset(
        t.name for t in inputs if t.name in names and is_packed(t) and t.ranks[-1] in known
    )


def emit_packed(build: Builder, codes: Any) -> Any:
    """int4 codes [..., n] as uint8 [..., ceil(n / 2)]: `pack_int4` in the host graph."""
    last = value_of(codes).dim() - 1
    extent = value_of(codes).shape[last]
    shifted = build.call(aten.add.Scalar, codes, OFFSET)
    unsigned = build.call(aten.to.dtype, shifted, torch.uint8)
    if extent % _EACH:
        unsigned = build.call(aten.constant_pad_nd.default, unsigned, [0, 1])
    low, high = (
        build.call(aten.slice.Tensor, unsigned, last, start, extent + extent % _EACH, _EACH)
        for start in (0, 1)
    )
    return build.call(aten.add.Tensor, low, build.call(aten.mul.Scalar, high, 16))
