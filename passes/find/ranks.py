"""Ranks of mixed attention: which axes are the digits of which rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from attn_rewrite.passes.find.axes import Atoms

HEAD_RANKS = ("h", "i", "j", "k", "l", "n", "o")


@dataclass(frozen=True)
class Places:
    """Which atoms are what; ``heads`` of any tensor, ``group`` those of Q's heads that share a
    key head, ``widths`` the contracted atoms of each score product."""

    b: Atoms
    heads: Atoms
    q: Atoms
    kv: Atoms
    f: Atoms
    group: Atoms = ()
    widths: tuple[Atoms, ...] = ()


@dataclass(frozen=True)
class Lines:
    """The ranks of one Einsum, each with the atoms that are its digits."""

    ranks: tuple[tuple[str, Atoms], ...]

    def line(self, atom: int) -> tuple[str, Atoms]:
        """The rank of an atom and all its digits; `KeyError` for an axis from elsewhere."""
        for rank, line in self.ranks:
            if atom in line:
                return rank, line
        raise KeyError(f"atom {atom} is not iterated here")


class UnplacedError(Exception):
    """An axis that no rank of the Einsum has: not an attention of the kind looked for."""


def place_of(rank: str) -> tuple[int, str]:
    """b, heads, q, kv, then widths."""
    order: Sequence[str] = ("b", "h", "hkv", *HEAD_RANKS[1:], "q", "kv")
    return (order.index(rank), "") if rank in order else (len(order), rank)
