"""Roles of axes: which atoms are batch, heads, query heads per key head, positions and widths.

Decided by what depends on what: key axes are normalised and contracted, query axes belong to Q
alone, batch-like axes are shared.  Heads are the shared axes that a projection's feature axis
splits into; where no such split is visible, the batch-like axis next to the positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import fx

from attn_rewrite.cascade.expr import Const, Expr, Extent, Rank, call, ranks_of, transform
from attn_rewrite.graph import is_call, is_parameter, is_tensor, shape_of
from attn_rewrite.passes.find.axes import Atoms, Axes
from attn_rewrite.passes.find.layout import Dims, pull
from attn_rewrite.passes.find.lift import Dot
from attn_rewrite.passes.find.product import contraction, of_weights
from attn_rewrite.site import Factor, Operand
from attn_rewrite.sizes import as_size, divide, same_size

_STEPS = 24
# Projections that an axis of Q is followed through: its own, and one per head behind it.
_PROJECTIONS = 2
# Operators that keep every axis where it is: position embeddings, norms, activations.
KEEPS_AXES = frozenset(
    "add sub mul div neg cat layer_norm rms_norm native_layer_norm tanh pow softmax index_put "
    "to _to_copy rotary dropout sigmoid silu gelu relu elu normalize linalg_vector_norm "
    "where".split()
)


@dataclass(frozen=True)
class Roles:
    """Atoms of each role, outermost first; ``h`` shared heads, ``g`` query heads per shared
    head."""

    b: Atoms
    h: Atoms
    g: Atoms
    q: Atoms
    kv: Atoms
    d: Atoms
    f: Atoms

    def of(self, atom: int) -> str:
        """Role of an atom."""
        for role in ("b", "h", "g", "q", "kv", "d", "f"):
            if atom in getattr(self, role):
                return role
        raise KeyError(f"atom {atom} has no role")

    def line(self, atom: int) -> tuple[str, Atoms]:
        """The rank an atom is a digit of, and all digits of that rank."""
        role = self.of(atom)
        return ("h", self.h + self.g) if role in "hg" else (role, getattr(self, role))

    def knows(self, atoms: Atoms) -> bool:
        """True if every atom has a role."""
        everything = {a for r in ("b", "h", "g", "q", "kv", "d", "f") for a in getattr(self, r)}
        return set(atoms) <= everything


def siblings(node: fx.Node, dims: tuple[Atoms, ...], width: Atoms, axes: Axes) -> set[int]:
    """Atoms that share a dimension with ``width`` where the tensor comes from a projection."""
    for _, at in _history(node, dims, axes):
        wide = set(axes.resolve(width))
        for dim in at:
            atoms = axes.resolve(dim)
            if wide & set(atoms) and len(atoms) > len(wide & set(atoms)):
                return set(atoms) - wide
    return set()


def _history(
    node: fx.Node, dims: tuple[Atoms, ...], axes: Axes
) -> Iterator[tuple[fx.Node, tuple[Atoms, ...]]]:
    """The tensor and the ones before it that hold the same elements, as far as that is seen."""
    step: tuple[fx.Node, tuple[Atoms, ...]] | None = (node, dims)
    for _ in range(_STEPS):
        if step is None:
            return
        yield step
        step = _back(*step, axes)


def _back(
    node: fx.Node, dims: tuple[Atoms, ...], axes: Axes
) -> tuple[fx.Node, tuple[Atoms, ...]] | None:
    part = node.args[0] if is_call(node, "getitem") else node
    if is_call(part, "split", "chunk", "split_with_sizes", "slice"):
        assert isinstance(part, fx.Node)
        source = part.args[0]
        return (source, dims) if isinstance(source, fx.Node) and is_tensor(source) else None
    if is_call(node, "pad", "constant_pad_nd"):
        source = node.args[0]
        return (source, _resized(source, node, dims, axes)) if is_tensor(source) else None  # type: ignore[arg-type, return-value]
    moved = pull(node, dims, axes)
    if moved is not None:
        return moved[0], _as_atoms(*moved, axes)
    if is_call(node, "view", "reshape"):
        return _inner_axes(node, dims, axes)
    if is_call(node, *KEEPS_AXES):
        source = next((a for a in node.all_input_nodes if _carries_axes(a, node)), None)
        return None if source is None else (source, dims)
    return None


def _inner_axes(
    node: fx.Node, dims: tuple[Atoms, ...], axes: Axes
) -> tuple[fx.Node, tuple[Atoms, ...]] | None:
    """A view that cannot be followed (a length cut into blocks of a symbolic number): its innermost
    dimensions, as far as they are as long before, are what they were."""
    source = node.args[0]
    if not isinstance(source, fx.Node) or not is_tensor(source):
        return None
    before, after = shape_of(source), shape_of(node)
    kept = 0
    for a, b in zip(reversed(before), reversed(after), strict=False):
        if not same_size(as_size(a), as_size(b)):
            break
        kept += 1
    outer = tuple(axes.fresh(s) for s in before[: len(before) - kept])
    return (source, (*outer, *dims[len(dims) - kept :])) if kept else None


def _resized(
    source: fx.Node, node: fx.Node, dims: tuple[Atoms, ...], axes: Axes
) -> tuple[Atoms, ...]:
    """The axes of ``node``, where its source is as long; others are axes of their own."""
    triples = zip(dims, shape_of(source), shape_of(node), strict=True)
    return tuple(d if same_size(as_size(a), as_size(b)) else axes.fresh(a) for d, a, b in triples)


def _carries_axes(source: fx.Node, node: fx.Node) -> bool:
    """An activation of the rank of ``node`` whose axes, but for the last, are as long."""
    if not is_tensor(source) or is_parameter(source):
        return False
    shapes = shape_of(source), shape_of(node)
    if len(shapes[0]) != len(shapes[1]):
        return False
    pairs = zip(shapes[0][:-1], shapes[1][:-1], strict=True)
    return all(same_size(as_size(a), as_size(b)) for a, b in pairs)


def from_features(node: fx.Node, dims: tuple[Atoms, ...], wanted: Atoms, axes: Axes) -> bool:
    """True if the atoms come from the feature axis of a projection: they are channels, not
    positions."""
    if same_size(axes.extent(wanted), 1):
        return False  # one key: nothing tells
    for here, at in _history(node, dims, axes):
        if is_call(here, "linear", "addmm", "conv2d", "conv1d"):
            place = len(at) - 1 if is_call(here, "linear", "addmm") else 1
            return set(axes.resolve(wanted)) <= set(axes.resolve(at[place]))
    return False


def is_channel(node: fx.Node, dims: tuple[Atoms, ...], wanted: Atoms, axes: Axes) -> bool | None:
    """True if the atoms are channels of a projection with weights of the model, its batch axes
    included; False if they pass it as they are; None where there is none."""
    found: bool | None = None
    for _ in range(_PROJECTIONS):
        made = next(
            ((c.product, at) for n, at in _history(node, dims, axes) if (c := contraction(n))), None
        )
        if made is None:
            return found
        product, dims = made
        left = of_weights(product.left)
        if left == of_weights(product.right):
            return found
        sides = [(product.left, product.left_labels), (product.right, product.right_labels)]
        (_, weights), (node, own) = sides if left else sides[::-1]
        labels = dict(zip(product.out_labels, dims, strict=True))
        inside = {a for x in weights for a in axes.resolve(labels.get(x, ()))}
        if set(axes.resolve(wanted)) <= inside:
            return True
        found = False
        sizes = shape_of(node)
        dims = tuple(labels.get(x) or axes.fresh(n) for x, n in zip(own, sizes, strict=True))
    return found


def _as_atoms(node: fx.Node, dims: Dims, axes: Axes) -> tuple[Atoms, ...]:
    """Coordinates as the atoms they vary with; an axis read at one place only is an atom of its
    own."""
    return tuple(
        d if not isinstance(d, Expr)
        else tuple(sorted(int(n[1:]) for n in ranks_of(d))) or axes.fresh(size)
        for d, size in zip(dims, shape_of(node), strict=True)
    )  # fmt: skip


def assign(
    rows: Atoms,
    keys: Atoms,
    dot: Dot,
    query: tuple[fx.Node, tuple[Atoms, ...]],
    key: tuple[fx.Node, tuple[Atoms, ...]],
    value: tuple[fx.Node, tuple[Atoms, ...]],
    features: Atoms,
    axes: Axes,
) -> Roles:
    """Give every atom of a site its role; ``rows`` are the score's atoms without the keys."""
    width = tuple(a for x in dot.product.contracted for a in dot.atoms[x])
    related = (
        siblings(*query, width, axes)
        | siblings(*key, width, axes)
        | siblings(*value, features, axes)
    )
    keys, width, features = (axes.resolve(x) for x in (keys, width, features))
    rows = axes.resolve(rows)  # after the walks: they may split atoms
    related = set(axes.resolve(tuple(related)))
    shared_with = {a for _, dims in (key, value) for d in dims for a in axes.resolve(d)}
    shared = tuple(a for a in rows if a in shared_with)
    alone = tuple(a for a in rows if a not in shared_with)
    heads = tuple(a for a in shared if a in related)
    beside = {a for d in query[1] if set(line := axes.resolve(d)) & set(heads) for a in line}
    group = tuple(a for a in alone if a in related or a in beside)
    if len(group) == len(alone) and group and not heads:
        group = group[:-1]  # a query axis is needed: the innermost
    batch = tuple(a for a in shared if a not in related)
    if not heads and not group:
        origins = {a: is_channel(*query, (a,), axes) for a in (*alone, *batch)}
        origins |= {a: is_channel(*key, (a,), axes) for a in batch if origins[a] is None}
        channels = {part: known for a, known in origins.items() for part in axes.resolve((a,))}
        batch, alone, keys = (axes.resolve(x) for x in (batch, alone, keys))
        width, features = axes.resolve(width), axes.resolve(features)
        batch, heads, group = _by_position(batch, alone, keys, query[1], channels, axes)
    query_axes = tuple(a for a in alone if a not in group)
    return Roles(batch, heads, group, query_axes, keys, width, features)


def _by_position(
    shared: Atoms,
    alone: Atoms,
    keys: Atoms,
    dims: tuple[Atoms, ...],
    channels: Mapping[int, bool | None],
    axes: Axes,
) -> tuple[Atoms, Atoms, Atoms]:
    """(batch, heads, group) from the dimensions of Q: the first batch-like one is the batch.

    A query axis that shares its dimension with a batch-like one is a group of heads.
    """
    lines = [axes.resolve(d) for d in dims]
    like = [d for d in lines if set(d) & set(shared)]
    group = tuple(a for a in alone if any(a in d for d in like))
    batch = like[0] if like and not set(like[0]) & set(group) else ()
    inside = {a for d in like for a in d}
    kept = tuple(a for a in shared if a in batch or a not in inside)
    # What may change, and what a projection lets pass as it is (windows of a model with one head),
    # is a number of sequences (queries with keys of their own), not of heads.
    heads = tuple(
        a for a in shared
        if a not in kept and isinstance(axes.size(a), int) and channels.get(a) is not False
    )  # fmt: skip
    kept = tuple(a for a in shared if a not in heads)
    if not heads and not group:
        group = _heads_of_one_key(alone, keys, channels, axes)
    return kept, heads, group


def _heads_of_one_key(
    alone: Atoms, keys: Atoms, channels: Mapping[int, bool | None], axes: Axes
) -> Atoms:
    """Which axes of Q alone are heads, where no axis is shared with the keys: channels of a
    projection; where none is seen, the ones that are not as many as the keys, or of fixed size.
    """
    known = [channels.get(a) for a in alone]
    found = tuple(a for a in alone if channels.get(a))
    if None not in known and len(found) < len(alone):
        return found
    as_many = [a for a in alone if same_size(axes.size(a), axes.extent(keys))]
    if len(as_many) == 1:
        return tuple(a for a in alone if a not in as_many)
    fixed = tuple(a for a in alone if isinstance(axes.size(a), int))
    if 0 < len(fixed) < len(alone):
        return fixed
    return alone[: -_positions(alone, keys, axes)]


def _positions(alone: Atoms, keys: Atoms, axes: Axes) -> int:
    """How many of the innermost query axes are positions: as many as the keys have (rows and
    columns of an image) where their lengths agree or all have one ratio (pooled keys), else one.
    """
    own = [axes.size(a) for a in alone[-len(keys) :]]
    if len(own) != len(keys):
        return 1
    ratios = [divide(s, axes.size(k)) for s, k in zip(own, keys, strict=True)]
    if ratios[0] is None or any(r is None or not same_size(r, ratios[0]) for r in ratios):
        return 1
    return len(keys)


def operand(node: fx.Node, dims: tuple[Atoms, ...], roles: Roles, axes: Axes) -> Operand:
    """The operand with every atom named by its role."""
    factors = tuple(
        tuple(Factor(roles.of(a), a, axes.size(a)) for a in axes.resolve(dim)) for dim in dims
    )
    return Operand(node, factors)


def groups(
    roles: Roles, axes: Axes, wanted: tuple[tuple[str, ...], ...]
) -> tuple[tuple[Factor, ...], ...]:
    """Factors of canonical dimensions, one tuple of roles each."""
    return tuple(
        tuple(Factor(role, a, axes.size(a)) for role in group for a in getattr(roles, role))
        for group in wanted
    )


class Lines(Protocol):
    """What says which rank an atom belongs to."""

    def line(self, atom: int) -> tuple[str, Atoms]:
        """The rank and the atoms that are its digits, outermost first; `KeyError` if unknown."""


def in_ranks(expr: Expr, lines: Lines, axes: Axes) -> Expr | None:
    """Rewrite coordinates of atoms as coordinates of ranks; None if that needs a symbolic radix."""
    failed: list[int] = []

    def rule(node: Expr) -> Expr | None:
        if isinstance(node, (Rank, Extent)):
            name = node.name if isinstance(node, Rank) else node.rank
            if not name.startswith("@"):
                return None
            atom = int(name[1:])
            of = _place if isinstance(node, Rank) else _length
            new = of(atom, lines, axes)
            if new is None:
                failed.append(atom)
            return new
        return None

    result = transform(expr, rule)
    return None if failed else result


def _place(atom: int, lines: Lines, axes: Axes) -> Expr | None:
    parts = axes.resolve((atom,))
    total: Expr | None = None
    for part in parts:
        place = _digit(part, lines, axes)
        if place is None or (total is not None and not isinstance(axes.size(part), int)):
            return None
        total = place if total is None else total * axes.size(part) + place
    return total


def _digit(atom: int, lines: Lines, axes: Axes) -> Expr | None:
    rank, line = lines.line(atom)
    place = line.index(atom)
    inner = axes.extent(line[place + 1 :])
    if not isinstance(inner, int):
        return None
    value: Expr = Rank(rank) if inner == 1 else call("floordiv", Rank(rank), inner)
    if place == 0:
        return value
    size = axes.size(atom)
    return value % size if isinstance(size, int) else None


def _length(atom: int, lines: Lines, axes: Axes) -> Expr | None:
    size = axes.extent((atom,))
    if isinstance(size, int):
        return Const(size)
    parts = axes.resolve((atom,))
    rank, line = lines.line(parts[0])
    return Extent(rank) if line == parts else None
