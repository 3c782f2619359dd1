"""Which axis is which: axes as atoms that views split and merge.

Every dimension of a tensor near a softmax is described by a tuple of *atoms*, outermost first.  An
atom is an axis with an identity; two axes of equal length are never confused.  A view that splits a
dimension splits atoms, for the whole site at once, so that any head packing, any permutation and
any window partition end in the same description.  An empty tuple is a dimension of length 1.
"""

from __future__ import annotations

from collections.abc import Sequence

from attn_rewrite.sizes import Size, as_size, divide, same_size

Atoms = tuple[int, ...]


class Axes:
    """The atoms of one site: their sizes, and what split atoms were split into."""

    def __init__(self) -> None:
        self._sizes: list[Size] = []
        self._parts: dict[int, Atoms] = {}

    def fresh(self, size: Size) -> Atoms:
        """A new atom of ``size``; no atom at all for length 1."""
        size = as_size(size)
        if same_size(size, 1):
            return ()
        self._sizes.append(size)
        return (len(self._sizes) - 1,)

    def line(self, size: Size) -> Atoms:
        """A new atom even for length 1: an axis whose identity matters (the keys)."""
        self._sizes.append(as_size(size))
        return (len(self._sizes) - 1,)

    def size(self, atom: int) -> Size:
        """Extent of an atom."""
        return self._sizes[atom]

    def resolve(self, atoms: Sequence[int]) -> Atoms:
        """The atoms with every split one replaced by its parts."""
        out: list[int] = []
        for atom in atoms:
            parts = self._parts.get(atom)
            out.extend((atom,) if parts is None else self.resolve(parts))
        return tuple(out)

    def extent(self, atoms: Sequence[int]) -> Size:
        """Product of the sizes."""
        total: Size = 1
        for atom in self.resolve(atoms):
            total = total * self._sizes[atom]
        return as_size(total)

    def split(self, atom: int, outer: Size) -> tuple[int, int] | None:
        """Split ``atom`` into (outer, inner); None if the size does not divide."""
        inner = divide(self._sizes[atom], outer)
        if inner is None:
            return None
        (first,), (second,) = self.fresh(outer), self.fresh(inner)
        self._parts[atom] = (first, second)
        return first, second

    def regroup(self, dims: Sequence[Atoms], sizes: Sequence[Size]) -> list[Atoms] | None:
        """Describe a view: the atoms of ``dims`` in order, dealt out to dimensions of ``sizes``.

        Splits atoms where a new boundary falls inside one; None if no exact boundary exists.
        """
        queue = [a for dim in dims for a in self.resolve(dim)]
        result: list[Atoms] = []
        for size in sizes:
            taken = self._take(queue, as_size(size))
            if taken is None:
                return None
            result.append(taken)
        if any(not same_size(self._sizes[a], 1) for a in queue):
            return None
        if queue and result:
            result[-1] += tuple(queue)
        return result

    def _take(self, queue: list[int], need: Size) -> Atoms | None:
        taken: list[int] = []
        while not same_size(need, 1):
            if not queue:
                return None
            atom = queue.pop(0)
            rest = divide(need, self._sizes[atom])
            if rest is not None:
                taken.append(atom)
                need = rest
                continue
            parts = self.split(atom, need)
            if parts is None:
                return None
            taken.append(parts[0])
            queue.insert(0, parts[1])
            need = 1
        return tuple(taken)

    def unify(self, left: Atoms, right: Atoms) -> tuple[Atoms, Atoms] | None:
        """Split both sides until they have the same list of sizes; None if they cannot."""
        left, right = self.resolve(left), self.resolve(right)
        a = self.regroup([right], [self._sizes[x] for x in left])
        if a is None:
            return None
        b = self.regroup([self.resolve(left)], [self.extent((x,)) for dim in a for x in dim])
        if b is None:
            return None
        return self.resolve(left), self.resolve(right)
