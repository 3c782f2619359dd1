"""The kernel that makes integer codes: tokens gathered, smoothed, scaled and rounded in one go.

Written by hand, since it is no attention: one program makes the codes of one group of tokens of one
head.  It computes in float64, as the oracle does: a code that rounds the other way is an error of a
whole step.  What is read is small beside the attention, so that this costs no time that counts.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def rounded(x, away: tl.constexpr):  # type: ignore[no-untyped-def]
    """To the nearest integer; halves to even, or away from zero."""
    if away:
        nearest = tl.floor(tl.abs(x) + 0.5)
        return tl.where(x < 0, -nearest, nearest)
    # Adding 1.5 * 2^52 leaves no bits behind the point.
    shifted = (x + 6755399441055744.0) - 6755399441055744.0
    return tl.where(tl.abs(x) < 2251799813685248.0, shifted, x)


@triton.jit  # type: ignore[untyped-decorator]
def centred(  # type: ignore[no-untyped-def]
    x, index, mean, batch, head, token, inside, channel, heads, length,
    stride_b, stride_h, stride_n, stride_d,
    lanes: tl.constexpr, gather: tl.constexpr, smooth: tl.constexpr,
):  # fmt: skip
    """Rows ``token`` of the new order less their mean, in float64; 0 outside."""
    source_head = head
    source = token
    if gather == 1:  # one order for all heads
        source = tl.load(index + token, mask=inside, other=0)
    if gather == 2:  # rows of all heads, one after the other
        row = tl.load(index + head * length + token, mask=inside, other=0)
        source_head = row // length
        source = row - source_head * length
    where = inside[:, None] & (channel < lanes)[None, :]
    at = x + batch * stride_b + source_head * stride_h + source * stride_n
    found = tl.load(at[:, None] + (channel * stride_d)[None, :], mask=where, other=0.0)
    wide = found.to(tl.float32).to(tl.float64)
    if smooth:
        middle = tl.load(
            mean + (batch * heads + head) * lanes + channel, mask=channel < lanes, other=0.0
        )
        wide = tl.where(where, wide - middle[None, :], 0.0)
    return wide


@triton.jit  # type: ignore[untyped-decorator]
def stored(  # type: ignore[no-untyped-def]
    codes, code, row, inside, channel,
    lanes: tl.constexpr, padded: tl.constexpr, tile: tl.constexpr, halves: tl.constexpr,
):  # fmt: skip
    """Write the rows ``row`` of codes: a byte each, or (halves) two in a byte with 8 added, the
    first in the low half; a half to spare is 0."""
    if halves:
        half = tl.where(channel < lanes, code.to(tl.int32) + 8, 0)
        low, high = tl.split(tl.reshape(half, [tile, padded // 2, 2]))
        byte = tl.arange(0, padded // 2)
        mask = inside[:, None] & (byte < (lanes + 1) // 2)[None, :]
        at = codes + row[:, None] * ((lanes + 1) // 2) + byte[None, :]
        tl.store(at, (low + high * 16).to(tl.uint8), mask=mask)
    else:
        mask = inside[:, None] & (channel < lanes)[None, :]
        at = codes + row[:, None] * lanes + channel[None, :]
        tl.store(at, code.to(tl.int32).to(tl.int8), mask=mask)


@triton.jit  # type: ignore[untyped-decorator]
def quantise_kernel(  # type: ignore[no-untyped-def]
    x, index, mean, given, codes, scales, heads, length, groups, largest, smallest,
    stride_b, stride_h, stride_n, stride_d,
    lanes: tl.constexpr, padded: tl.constexpr, shared: tl.constexpr, tile: tl.constexpr,
    gather: tl.constexpr, smooth: tl.constexpr, kind: tl.constexpr, away: tl.constexpr,
    halves: tl.constexpr,
):  # fmt: skip
    """Codes [b, h, n, d] and, unless kind is "given", a float32 scale for each group of tokens.

    halves: codes of four bits, two in a byte [b, h, n, ceil(d / 2)], as `pack_int4` has them.

    kind "block": shared tokens share one; "token": each has its own, and shared is tile; "given":
    one a channel comes from outside, float64.
    """
    group = tl.program_id(0).to(tl.int64)
    pair = tl.program_id(1).to(tl.int64)
    batch, head = pair // heads, pair % heads
    channel = tl.arange(0, padded)
    first = group * shared
    end = tl.minimum(first + shared, length)
    scale = tl.full([tile, 1], 1.0, tl.float64)
    if kind == "given":
        row = tl.load(given + pair * lanes + channel, mask=channel < lanes, other=1.0)
        scale = tl.broadcast_to(row[None, :], [tile, padded])
    else:
        top = tl.zeros([tile], tl.float64)
        wrong = tl.zeros([tile], tl.int32)
        for start in range(0, shared, tile):
            token = first + start + tl.arange(0, tile)
            part = centred(
                x, index, mean, batch, head, token, token < end, channel, heads, length,
                stride_b, stride_h, stride_n, stride_d, lanes, gather, smooth,
            )  # fmt: skip
            top = tl.maximum(top, tl.max(tl.abs(part), 1))
            wrong = tl.maximum(wrong, tl.max((part != part).to(tl.int32), 1))
        if kind == "block":
            top = tl.zeros([tile], tl.float64) + tl.max(top, 0)
            wrong = tl.zeros([tile], tl.int32) + tl.max(wrong, 0)
        size = tl.maximum(top, smallest) / largest
        size = tl.where(wrong > 0, float("nan"), size)  # maxima lose what is no number
        scale = size[:, None]
        place = tl.arange(0, tile)
        if kind == "block":
            tl.store(scales + pair * groups + group + place, size.to(tl.float32), mask=place < 1)
        else:
            token = first + place
            tl.store(scales + pair * length + token, size.to(tl.float32), mask=token < end)
    for start in range(0, shared, tile):
        token = first + start + tl.arange(0, tile)
        inside = token < end
        part = centred(
            x, index, mean, batch, head, token, inside, channel, heads, length,
            stride_b, stride_h, stride_n, stride_d, lanes, gather, smooth,
        )  # fmt: skip
        code = rounded(part / scale, away)
        code = tl.minimum(tl.maximum(code, -largest), largest)
        stored(codes, code, pair * length + token, inside, channel, lanes, padded, tile, halves)


@triton.jit  # type: ignore[untyped-decorator]
def channels_kernel(  # type: ignore[no-untyped-def]
    x, mean, scale, mean_out, scale_out, heads, length, largest, smallest,
    stride_b, stride_h, stride_n, stride_d,
    lanes: tl.constexpr, padded: tl.constexpr, tile: tl.constexpr, smooth: tl.constexpr,
    scaled: tl.constexpr,
):  # fmt: skip
    """What a head needs of all its tokens before `quantise_kernel`, [b, h, d]: the mean of each
    channel (smooth), and its largest magnitude less that mean over ``largest`` (scaled).

    In float64 for the codes, and in float32 (``_out``) for the attention.
    """
    pair = tl.program_id(0).to(tl.int64)
    batch, head = pair // heads, pair % heads
    channel = tl.arange(0, padded)
    total = tl.zeros([padded], tl.float64)
    high = tl.full([padded], float("-inf"), tl.float64)
    low = tl.full([padded], float("inf"), tl.float64)
    wrong = tl.zeros([padded], tl.int32)
    for start in range(0, length, tile):
        token = start + tl.arange(0, tile).to(tl.int64)
        inside = token < length
        part = centred(
            x, x, x, batch, head, token, inside, channel, heads, length,
            stride_b, stride_h, stride_n, stride_d, lanes, 0, False,
        )  # fmt: skip
        total += tl.sum(part, 0)
        high = tl.maximum(high, tl.max(tl.where(inside[:, None], part, float("-inf")), 0))
        low = tl.minimum(low, tl.min(tl.where(inside[:, None], part, float("inf")), 0))
        wrong = tl.maximum(wrong, tl.max((part != part).to(tl.int32), 0))
    middle = tl.zeros([padded], tl.float64)
    at = pair * lanes + channel
    if smooth:
        middle = total / length
        tl.store(mean + at, middle, mask=channel < lanes)
        tl.store(mean_out + at, middle.to(tl.float32), mask=channel < lanes)
    if scaled:
        top = tl.maximum(tl.abs(high - middle), tl.abs(low - middle))
        size = tl.maximum(top, smallest) / largest
        size = tl.where(wrong > 0, float("nan"), size)
        tl.store(scale + at, size, mask=channel < lanes)
        tl.store(scale_out + at, size.to(tl.float32), mask=channel < lanes)
