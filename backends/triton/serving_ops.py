"""Operators for serving: sequences laid end to end, and a cache in pages.

``attn_rewrite::triton_varlen(inputs, q_starts, kv_starts, longest_q, longest_kv, cascade)`` runs
`attend_varlen`: Q [h, tokens, d], K and V [hkv, tokens, .], further inputs of the cascade as they
are declared (``[1, .., tokens]`` where they have a batch rank); it gives AV [h, tokens, f] and LSE
[h, tokens].

``attn_rewrite::triton_paged(inputs, table, lengths, cascade)`` runs `decode` over pages: Q [b, h,
q, d], K and V [pages, hkv, page, .] and so what else has a value for each key of each batch entry,
``table`` int32 [b, n], ``lengths`` int32 [b]; it gives AV [b, h, q, f] and LSE [b, h, q].

Both are for inference: a backward pass through them is an error, not a zero.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attn_rewrite.backends.triton.decode import Pages, decode
from attn_rewrite.backends.triton.launch import check_device, result_dtype
from attn_rewrite.backends.triton.prepare import cascade_of, outputs_of
from attn_rewrite.backends.triton.varlen import Sequences, attend_varlen
from attn_rewrite.errors import LowerError


def _named(cascade: str, inputs: Sequence[Tensor]) -> dict[str, Tensor]:
    names = [t.name for t in cascade_of(cascade).inputs]
    if len(names) != len(inputs):
        raise LowerError(f"got {len(inputs)} inputs, the cascade has {', '.join(names)}")
    return dict(zip(names, inputs, strict=True))


@torch.library.triton_op("attn_rewrite::triton_varlen", mutates_args=())
def triton_varlen(
    inputs: Sequence[Tensor],
    q_starts: Tensor,
    kv_starts: Tensor,
    longest_q: int,
    longest_kv: int,
    cascade: str,
) -> list[Tensor]:
    """Attention within each of several sequences; see the module."""
    check_device([*inputs, q_starts, kv_starts])
    found = attend_varlen(
        cascade_of(cascade), _named(cascade, inputs),
        Sequences(q_starts, kv_starts, longest_q, longest_kv), wrap=True,
    )  # fmt: skip
    return [found[n] for n in outputs_of(cascade)]


@triton_varlen.register_fake  # type: ignore[untyped-decorator]
def _(
    inputs: Sequence[Tensor],
    q_starts: Tensor,
    kv_starts: Tensor,
    longest_q: int,
    longest_kv: int,
    cascade: str,
) -> list[Tensor]:
    (heads, tokens, _), lanes = inputs[0].shape, inputs[2].shape[2]
    return _results(inputs, (heads, tokens), lanes)


@torch.library.triton_op("attn_rewrite::triton_paged", mutates_args=())
def triton_paged(
    inputs: Sequence[Tensor], table: Tensor, lengths: Tensor, cascade: str
) -> list[Tensor]:
    """Attention of few queries over a cache in pages; see the module."""
    check_device([*inputs, table, lengths])
    found = decode(
        cascade_of(cascade), _named(cascade, inputs), pages=Pages(table, lengths), wrap=True
    )
    return [found[n] for n in outputs_of(cascade)]


@triton_paged.register_fake  # type: ignore[untyped-decorator]
def _(inputs: Sequence[Tensor], table: Tensor, lengths: Tensor, cascade: str) -> list[Tensor]:
    batch, heads, length, _ = inputs[0].shape
    return _results(inputs, (batch, heads, length), inputs[2].shape[3])


def _results(inputs: Sequence[Tensor], rows: Sequence[int], lanes: int) -> list[Tensor]:
    out = inputs[0].new_empty([*rows, lanes], dtype=result_dtype(inputs))
    return [out, inputs[0].new_empty(list(rows), dtype=torch.float32)]
