"""The protocol of a canonicalisation: one node in, an equal node in normal form out.

A new spelling of attention is one new file here and one line in `SPELLINGS`.  The finder reads a
canonicalised *copy* of the host graph; what is not rewritten keeps the author's operators.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from attn_rewrite.graph import GraphBuilder
from attn_rewrite.passes.transform import Exactness

# In `targets`: every operator that writes to an operand, whatever its name.
WRITES = "a write"


@dataclass(frozen=True)
class Canonicalization:
    """Rewrites one kind of node; subclasses give `name`, `exactness`, `targets` and `rewrite`."""

    name: ClassVar[str]
    exactness: ClassVar[Exactness] = Exactness.REASSOCIATED
    targets: ClassVar[frozenset[str]]  # operator names, any overload, or `WRITES`
    outermost: ClassVar[bool] = False  # not in graphs that are called

    def rewrite(self, node: fx.Node, build: GraphBuilder) -> fx.Node | None:
        """A node of equal value in normal form, built with ``build``; None to leave all as it is,
        ``node`` itself where it stays and its readers were changed."""
        raise TypeError(f"{type(self).__name__} must define rewrite()")
