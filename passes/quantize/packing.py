"""Codes of less than a byte, packed: how caches and files store what the cascades compute with."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

OFFSET = 8  # added to int4 codes, so that -8 .. 7 become 0 .. 15


def pack(codes: Tensor, bits: int, word: int = 8) -> Tensor:
    """Unsigned codes [..., n] of ``bits`` bits as int64 words of ``word`` bits, low bits first.

    A tail that does not fill a word is filled with code 0.  KIVI stores 32 / bits codes an int32.
    Raises `ValueError` for codes out of range, or bits that do not divide the word.
    """
    import torch

    each = _per_word(bits, word)
    codes = codes.to(torch.int64)
    if codes.numel() and not (int(codes.min()) >= 0 and int(codes.max()) < 2**bits):
        found = f"{int(codes.min())} to {int(codes.max())}"
        raise ValueError(f"codes of {bits} bits are 0 to {2**bits - 1}, got {found}")
    tail = -codes.shape[-1] % each
    codes = torch.nn.functional.pad(codes, (0, tail))
    codes = codes.reshape(*codes.shape[:-1], -1, each)
    shifts = bits * torch.arange(each, device=codes.device)
    return (codes << shifts).sum(-1)


def unpack(words: Tensor, bits: int, count: int, word: int = 8) -> Tensor:
    """The first ``count`` codes of packed words [..., m]: `pack` undone."""
    import torch

    each = _per_word(bits, word)
    shifts = bits * torch.arange(each, device=words.device)
    codes = (words.to(torch.int64)[..., None] >> shifts) & (2**bits - 1)
    found: Tensor = codes.flatten(-2)[..., :count]
    return found


def pack_int4(codes: Tensor) -> Tensor:
    """int4 codes (-8 .. 7) [..., n] two in a byte, even positions in the low half: uint8.

    The form of ONNX Runtime's quantised caches.
    """
    import torch

    return pack(codes.to(torch.int64) + OFFSET, 4).to(torch.uint8)


def unpack_int4(packed: Tensor, count: int) -> Tensor:
    """The first ``count`` int4 codes of a packed tensor, as int8."""
    import torch

    return (unpack(packed, 4, count) - OFFSET).to(torch.int8)


def _per_word(bits: int, word: int) -> int:
    if bits < 1 or word % bits:
        raise ValueError(f"{bits} bits do not divide a word of {word}")
    return word // bits
