"""Layout operators as maps between coordinates: what element of its input each output reads.

A dimension's *coordinate* is a tuple of atoms, or an expression once a slice with an offset was
crossed.  `pull` goes from an output to the input, `push` from an input to the output.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from attn_rewrite.cascade.expr import Const, Expr, Rank, substitute
from attn_rewrite.graph import TRANSPARENT, arguments, is_call, op_name, shape_of
from attn_rewrite.passes.find.axes import Atoms, Axes
from attn_rewrite.sizes import as_size, same_size

Coord = Atoms | Expr
Dims = tuple[Coord, ...]


def atom_rank(atom: int) -> Rank:
    """The rank that stands for an atom while a site is being read."""
    return Rank(f"@{atom}")


def coordinate(coord: Coord, axes: Axes) -> Expr | None:
    """The coordinate as one expression (mixed radix over atoms); None if a radix is symbolic."""
    if isinstance(coord, Expr):
        return coord
    total: Expr = Const(0)
    for atom in axes.resolve(coord):
        size = axes.size(atom)
        first = isinstance(total, Const)
        if not first and not isinstance(size, int):
            return None
        total = atom_rank(atom) if first else total * size + atom_rank(atom)
    return total


def pure(dims: Sequence[Coord]) -> tuple[Atoms, ...] | None:
    """The dims if every coordinate is atoms, else None."""
    return (
        None
        if any(isinstance(d, Expr) for d in dims)
        else tuple(d for d in dims if not isinstance(d, Expr))
    )


def _axis(value: Any, rank: int) -> int:
    return int(value) % rank if rank else 0


def pull(node: fx.Node, dims: Dims, axes: Axes) -> tuple[fx.Node, Dims] | None:
    """The input of a layout operator and the coordinates it is read at; None if it is not one."""
    if is_call(node, "getitem") and node.target is operator.getitem:
        return _pull_part(node, dims, axes)
    rule = _PULL.get(op_name(node))
    if rule is None and op_name(node) not in TRANSPARENT:
        return None
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or not hasattr(source.meta.get("val"), "shape"):
        return None
    if rule is None:
        return source, dims
    result = rule(node, dims, axes, shape_of(source))
    return None if result is None else (source, tuple(result))


def _pull_view(
    node: fx.Node, dims: Dims, axes: Axes, shape: tuple[Any, ...]
) -> Sequence[Coord] | None:
    atoms = pure(dims)
    if atoms is not None:
        return axes.regroup(atoms, shape)
    return _regrouped(node, dims, axes, shape)


def _regrouped(
    node: fx.Node, dims: Dims, axes: Axes, shape: tuple[Any, ...]
) -> Sequence[Coord] | None:
    """A view read at computed coordinates, which it may merge with others but not split."""
    named: dict[int, Expr] = {}
    held: list[Atoms] = []
    for size, coord in zip(shape_of(node), dims, strict=True):
        if isinstance(coord, Expr):
            (atom,) = own = axes.line(size)
            named[atom], coord = coord, own
        held.append(coord)
    moved = axes.regroup(held, shape)
    if moved is None or any(axes.resolve((a,)) != (a,) for a in named):
        return None
    out: list[Coord] = []
    for dim in moved:
        if not named.keys() & set(dim):
            out.append(dim)
            continue
        place = coordinate(dim, axes)
        if place is None:
            return None
        out.append(substitute(place, {atom_rank(a): e for a, e in named.items()}))
    return out


def _pull_permute(node: fx.Node, dims: Dims, axes: Axes, shape: tuple[Any, ...]) -> Sequence[Coord]:
    order = permutation(node, len(dims))
    out: list[Coord] = [()] * len(dims)
    for position, source in enumerate(order):
        out[source] = dims[position]
    return out


def permutation(node: fx.Node, rank: int) -> list[int]:
    """The order of input dimensions in the output of a permute or transpose."""
    order = list(range(rank))
    if op_name(node) == "permute":
        return [_axis(d, rank) for d in arguments(node)["dims"]]
    if op_name(node) in ("t", "numpy_T", "mT", "matrix_H", "mH") or len(node.args) < 3:
        a, b = rank - 2, rank - 1
    else:
        a, b = (_axis(d, rank) for d in (node.args[1], node.args[2]))
    if rank >= 2:
        order[a], order[b] = order[b], order[a]
    return order


def _pull_unsqueeze(
    node: fx.Node, dims: Dims, axes: Axes, shape: tuple[Any, ...]
) -> Sequence[Coord]:
    position = _axis(arguments(node)["dim"], len(dims))
    return [d for i, d in enumerate(dims) if i != position]


def _pull_squeeze(
    node: fx.Node, dims: Dims, axes: Axes, shape: tuple[Any, ...]
) -> Sequence[Coord] | None:
    if len(shape) == len(dims):
        return dims
    dropped = arguments(node).get("dim")
    where = [dropped] if isinstance(dropped, int) else dropped
    rank = len(shape)
    gone = [i for i, s in enumerate(shape) if same_size(as_size(s), 1)]
    if where is not None:
        gone = [i for i in gone if i in {_axis(d, rank) for d in where}]
    rest = iter(dims)
    return [() if i in gone else next(rest) for i in range(rank)]


def _pull_expand(node: fx.Node, dims: Dims, axes: Axes, shape: tuple[Any, ...]) -> Sequence[Coord]:
    inner = dims[len(dims) - len(shape) :]
    return [() if same_size(as_size(s), 1) else d for s, d in zip(shape, inner, strict=True)]


def _pull_repeat(
    node: fx.Node, dims: Dims, axes: Axes, shape: tuple[Any, ...]
) -> Sequence[Coord] | None:
    out: list[Coord] = []
    inner = dims[len(dims) - len(shape) :]
    repeats = arguments(node)["repeats"][len(dims) - len(shape) :]
    for size, coord, times in zip(shape, inner, repeats, strict=True):
        if same_size(as_size(size), 1):
            out.append(())  # however often it is repeated
            continue
        if not isinstance(coord, Expr) and isinstance(times, int) and times != 1:
            parts = axes.regroup([coord], [times, size])
            if parts is None:
                return None
            coord = parts[1]
        elif times != 1:
            return None
        out.append(coord)
    return out


def _pull_repeat_interleave(
    node: fx.Node, dims: Dims, axes: Axes, shape: tuple[Any, ...]
) -> Sequence[Coord] | None:
    named = arguments(node)
    times, where = named.get("repeats"), named.get("dim")
    if not isinstance(times, int) or where is None:
        return None
    position = _axis(where, len(dims))
    coord = dims[position]
    if isinstance(coord, Expr):
        return None
    parts = axes.regroup([coord], [shape[position], times])
    if parts is None:
        return None
    return [parts[0] if i == position else d for i, d in enumerate(dims)]


def _shifted(coord: Coord, start: Any, step: int, axes: Axes) -> Coord | None:
    place = coordinate(coord, axes)
    if place is None or not isinstance(start, int) or start < 0:
        return None
    return (place if step == 1 else place * step) + start if start or step != 1 else place


def _pull_slice(
    node: fx.Node, dims: Dims, axes: Axes, shape: tuple[Any, ...]
) -> Sequence[Coord] | None:
    named = arguments(node)
    position = _axis(named["dim"], len(dims))
    if same_size(as_size(shape[position]), as_size(shape_of(node)[position])):
        return dims
    place = _shifted(dims[position], named["start"] or 0, named["step"], axes)
    if place is None:
        return None
    return [place if i == position else d for i, d in enumerate(dims)]


def _pull_select(
    node: fx.Node, dims: Dims, axes: Axes, shape: tuple[Any, ...]
) -> Sequence[Coord] | None:
    named = arguments(node)
    position, index = _axis(named["dim"], len(shape)), named["index"]
    if not isinstance(index, int) or (index < 0 and not isinstance(shape[position], int)):
        return None
    index = index if index >= 0 else index + int(shape[position])
    at: Coord = () if same_size(as_size(shape[position]), 1) else Const(index)
    return [*dims[:position], at, *dims[position:]]


def _pull_part(node: fx.Node, dims: Dims, axes: Axes) -> tuple[fx.Node, Dims] | None:
    whole, index = node.args
    if not isinstance(whole, fx.Node) or not isinstance(index, int):
        return None
    name = op_name(whole)
    if name == "meshgrid":
        return _pull_grid(whole, index, dims)
    if name not in ("split", "chunk", "split_with_sizes", "unbind"):
        return None
    source = whole.args[0]
    assert isinstance(source, fx.Node)
    named = arguments(whole)
    position = _axis(named.get("dim", 0), len(shape_of(source)))
    if name == "unbind":
        return source, (*dims[:position], Const(index), *dims[position:])
    parts = whole.meta["val"]
    sizes = [p.shape[position] for p in parts[:index]]
    if not all(isinstance(s, int) for s in sizes):
        return None
    place = _shifted(dims[position], sum(sizes), 1, axes)
    if place is None:
        return None
    return source, tuple(place if i == position else d for i, d in enumerate(dims))


def _pull_grid(grid: fx.Node, index: int, dims: Dims) -> tuple[fx.Node, Dims] | None:
    """Part ``index`` of a ``meshgrid`` varies with one axis; "xy" swaps the first two."""
    named = arguments(grid)
    source = named["tensors"][index]
    place = 1 - index if named.get("indexing") == "xy" and index < 2 else index
    return (source, (dims[place],)) if len(shape_of(source)) == 1 else None


_PULL: dict[str, Callable[[fx.Node, Dims, Axes, tuple[Any, ...]], Sequence[Coord] | None]] = {
    **dict.fromkeys(
        (
            "view",
            "reshape",
            "_unsafe_view",
            "flatten",
            "unflatten",
            "view_as",
            "reshape_as",
            "_reshape_alias",
        ),
        _pull_view,
    ),
    **dict.fromkeys(
        (
            "permute",
            "transpose",
            "transpose_",
            "swapaxes",
            "swapdims",
            "t",
            "numpy_T",
            "mT",
            "mH",
            "adjoint",
        ),
        _pull_permute,
    ),
    "unsqueeze": _pull_unsqueeze,
    "unsqueeze_": _pull_unsqueeze,
    "squeeze": _pull_squeeze,
    "squeeze_": _pull_squeeze,
    **dict.fromkeys(("expand", "expand_as", "broadcast_to"), _pull_expand),
    "repeat": _pull_repeat,
    "repeat_interleave": _pull_repeat_interleave,
    "slice": _pull_slice,
    "select": _pull_select,
}


def only_moves(node: fx.Node) -> bool:
    """True for operators that give their input's elements in other places."""
    return op_name(node) in TRANSPARENT or op_name(node) in _PULL or is_call(node, "getitem")


def push(node: fx.Node, dims: tuple[Atoms, ...], axes: Axes) -> tuple[Atoms, ...] | None:
    """Where the atoms of the first input of a layout operator go; None if it is not one."""
    name = op_name(node)
    if name in TRANSPARENT:
        return dims
    rule = _PULL.get(name)
    if rule is _pull_view:
        moved = axes.regroup(dims, shape_of(node))
        return None if moved is None else tuple(moved)
    if rule is _pull_permute:
        return tuple(dims[i] for i in permutation(node, len(dims)))
    if rule is _pull_unsqueeze:
        position = _axis(arguments(node)["dim"], len(dims) + 1)
        return (*dims[:position], (), *dims[position:])
    if rule is _pull_squeeze:
        kept = [d for d in dims if axes.resolve(d)]
        wanted = [s for s in shape_of(node) if not same_size(as_size(s), 1)]
        return tuple(axes.regroup(kept, shape_of(node)) or ()) if len(kept) == len(wanted) else None
    if rule is _pull_expand and len(shape_of(node)) == len(dims):
        source = node.args[0]
        assert isinstance(source, fx.Node)
        pairs = zip(shape_of(source), shape_of(node), strict=True)
        return dims if all(same_size(as_size(a), as_size(b)) for a, b in pairs) else None
    if rule is _pull_slice:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        pairs = zip(shape_of(source), shape_of(node), strict=True)
        return dims if all(same_size(as_size(a), as_size(b)) for a, b in pairs) else None
    return None
