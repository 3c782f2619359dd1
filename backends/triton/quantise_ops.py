"""``attn_rewrite::quantise_tokens``: integer codes of an operand, made by one kernel.

``quantise_tokens(x, index, mean, scale, group, largest, away)``: ``x`` [b, h, n, d] of any strides;
``index`` int64 gives the token at each place of a new order, [n] for all heads or [h * n] as rows
of all heads one after the other; ``mean`` [b, h, d] float64 is taken off first.  A scale is shared
by ``group`` tokens and is their largest magnitude over ``largest``; with ``scale`` [b, h, d]
float64, one a channel, it comes from outside.  Gives codes int8 [b, h, n, d], rounded half to even
(``away``: away from zero) and saturated, and scales float32 [b, h, groups] (none: [0]).

The codes are those of the stages of the cascade, to the last bit.  A backward pass is an error.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from attn_rewrite.backends.triton.build import is_interpreted
from attn_rewrite.backends.triton.launch import check_device
from attn_rewrite.backends.triton.quantise_kernel import quantise_kernel
from attn_rewrite.errors import LowerError
from attn_rewrite.passes.quantize.quantisers import EPSILON

NAME = "attn_rewrite::quantise_tokens"
_TILE_ELEMENTS = 2048  # float64 numbers that four warps hold in registers


def tile_of(group: int, channels: int) -> int:
    """Tokens that are in registers at once: a power of two."""
    most = max(_TILE_ELEMENTS // padded(channels), 1)
    return min(most, padded(max(group, 1)))


def padded(extent: int) -> int:
    """The next power of two."""
    return 1 << max(extent - 1, 0).bit_length()


def constants(
    x: Tensor, index: Tensor | None, mean: Tensor | None, scale: Tensor | None, group: int,
    away: bool, halves: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """The constants that a call compiles the kernel with."""
    channels = x.shape[3]
    kind = "given" if scale is not None else "token" if group == 1 else "block"
    tile = tile_of(32 if kind != "block" else group, channels)
    return {
        "lanes": channels, "padded": max(padded(channels), 2 if halves else 1), "tile": tile,
        "shared": group if kind == "block" else tile,
        "gather": 0 if index is None else 1 if index.shape[0] == x.shape[2] else 2,
        "smooth": mean is not None, "kind": kind, "away": away, "halves": halves,
    }  # fmt: skip


def groups_of(length: Any, group: int) -> Any:
    """How many groups of tokens there are."""
    return (length + group - 1) // group


@torch.library.triton_op(NAME, mutates_args=())
def quantise_tokens(
    x: Tensor, index: Tensor | None, mean: Tensor | None, scale: Tensor | None, group: int,
    largest: float, away: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Codes and scales; see the module."""
    check_device([x, *(t for t in (index, mean, scale) if t is not None)])
    codes, scales = _results(x, scale, group)
    b, heads, length, _ = x.shape
    held = constants(x, index, mean, scale, group, away)
    interpreted = is_interpreted(quantise_kernel)
    kernel = quantise_kernel if interpreted else torch.library.wrap_triton(quantise_kernel)
    grid = (groups_of(length, held["shared"]), b * heads)
    if isinstance(grid[0], int) and math.prod(grid) * x.shape[3] == 0:
        return codes, scales
    read = x.float() if interpreted and x.dtype == torch.bfloat16 else x
    filled = [x if t is None else t.contiguous() for t in (index, mean, scale)]
    kernel[grid](
        read, *filled, codes, scales, heads, length, groups_of(length, group), float(largest),
        EPSILON, *read.stride(), **held,
    )  # fmt: skip
    return codes, scales


@quantise_tokens.register_fake  # type: ignore[untyped-decorator]
def _(
    x: Tensor, index: Tensor | None, mean: Tensor | None, scale: Tensor | None, group: int,
    largest: float, away: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _results(x, scale, group)


def _results(x: Tensor, scale: Tensor | None, group: int) -> tuple[Tensor, Tensor]:
    codes = x.new_empty(x.shape, dtype=torch.int8)
    shape = [0] if scale is not None else [*x.shape[:2], groups_of(x.shape[2], group)]
    return codes, x.new_empty(shape, dtype=torch.float32)


def _no_gradient(_ctx: Any, *_grads: Any) -> Any:
    raise LowerError(
        "integer codes made by a Triton kernel have no gradient; train with backend='torch', or "
        "call the model under torch.no_grad()"
    )


quantise_tokens.register_autograd(_no_gradient)
