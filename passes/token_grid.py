"""The token grid of a Site, from the shapes of the captured graph.

The token axis of Q is followed back to where it was flattened: the two or three axes that a reshape
merged into it, read from its input's shape, are the grid (the height and width a patch embedding
leaves, the frames of a video, the window of a Swin block).  Concatenations on the way are tokens
before and after it.  No class of any library is named.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from attn_rewrite.graph import arguments, is_parameter, is_tensor, op_name, shape_of
from attn_rewrite.token_layout import TokenLayout

if TYPE_CHECKING:
    from torch import fx

    from attn_rewrite.site import Site

_STEPS = 4000
_SPATIAL = frozenset({"conv1d", "conv2d", "conv3d", "convolution"})
_RESHAPES = frozenset({"view", "reshape", "flatten", "unflatten", "_unsafe_view"})
_KEEPS_LEADING = frozenset({"linear", "layer_norm", "rms_norm", "native_layer_norm", "softmax"})


def found_layout(site: Site) -> TokenLayout | None:
    """The layout of the queries of ``site``; None where no grid is visible or sizes are dynamic."""
    operand = site.inputs.get("Q")
    if operand is None or not isinstance(site.q_len, int) or site.q_len != site.kv_len:
        return None
    dims = [d for d, factors in enumerate(operand.dims) if any(f.role == "q" for f in factors)]
    if len(dims) != 1:
        return None
    spot = _Spot(operand.node, dims[0], site.q_len)
    for _ in range(_STEPS):
        step = _back(spot)
        if step is None:
            return None
        if isinstance(step, TokenLayout):
            return step
        spot = step
    return None


@dataclass(frozen=True)
class _Spot:
    """The token axis ``dim`` of ``node``: ``length`` grid tokens with others before and after.

    ``grid`` are inner axes found already: the axis still to be split comes before them.  ``start``
    is the first of the tokens on the axis, where a slice took some of it.
    """

    node: fx.Node
    dim: int
    length: int
    text: int = 0
    suffix: int = 0
    grid: tuple[int, ...] = ()
    start: int = 0

    def layout(self, grid: Sequence[int]) -> TokenLayout | None:
        """The layout, if ``grid`` has two or three axes in the end."""
        axes = tuple(n for n in (*grid, *self.grid))
        if not 2 <= len(axes) <= 3 or math.prod(axes) < 2:
            return None
        return TokenLayout(axes, text=self.text, suffix=self.suffix)


def _back(spot: _Spot) -> _Spot | TokenLayout | None:
    node, name = spot.node, op_name(spot.node)
    if node.op != "call_function":
        return spot.layout((spot.length,)) if spot.grid else None
    if name in _RESHAPES:
        return _reshape(spot)
    if name in ("transpose", "permute", "t"):
        return _permuted(spot)
    if name == "cat":
        return _cat(spot)
    if name == "slice":
        return _sliced(spot)
    if name in ("unsqueeze", "squeeze", "select"):
        return _dimension(spot)
    if name in _SPATIAL:
        return _embedded(spot)
    return _onward(spot)


def _onward(spot: _Spot) -> _Spot | TokenLayout | None:
    """Through an operator that keeps the axis in place: to the earliest input that has it."""
    shape = _shape(spot.node) if is_tensor(spot.node) else ()
    behind = len(shape) - spot.dim
    candidates = []
    for source in spot.node.all_input_nodes:
        value = source.meta.get("val")
        if isinstance(value, (tuple, list)):  # parts of a split: the axis stays where it is
            candidates.append((source, spot.dim))
            continue
        if not is_tensor(source):
            continue
        other = _shape(source)
        for dim in (len(other) - behind, spot.dim):
            if 0 <= dim < len(other) and shape and _equal(other[dim], shape[spot.dim]):
                candidates.append((source, dim))
                break
    activations = [c for c in candidates if not _is_constant(c[0])]
    if not activations:
        return spot.layout((spot.length,)) if spot.grid else None
    order = {n: i for i, n in enumerate(spot.node.graph.nodes)}
    node, dim = min(activations, key=lambda c: order[c[0]])
    return replace(spot, node=node, dim=dim)


def _is_constant(node: fx.Node) -> bool:
    """True if only parameters and constants lead to ``node`` (a position embedding)."""
    queue, seen = [node], {node}
    while queue:
        here = queue.pop()
        if here.op == "placeholder" and not is_parameter(here):
            return False
        if op_name(here) == "sym_size":  # a length, as that of the batch, says nothing of tokens
            continue
        fresh = [n for n in here.all_input_nodes if n not in seen]
        seen.update(fresh)
        queue += fresh
    return True


def _source(spot: _Spot) -> fx.Node | None:
    from torch import fx as torch_fx

    source = spot.node.args[0] if spot.node.args else None
    return source if isinstance(source, torch_fx.Node) and is_tensor(source) else None


def _reshape(spot: _Spot) -> _Spot | TokenLayout | None:
    """Find the input axes that became the token axis."""
    source = _source(spot)
    if source is None:
        return None
    before, after = _shape(source), _shape(spot.node)
    groups = _groups(before, after)
    mine = next((g for g in groups if spot.dim in g[1]), None)
    if mine is None:
        return None
    merged, split = (
        [d for d in side if n[d] != 1] for side, n in zip(mine, (before, after), strict=True)
    )
    if split == [spot.dim] and len(merged) > 1:
        return _merged(spot, source, [before[d] for d in merged], merged)
    if len(merged) == 1 and split == [spot.dim]:
        return replace(spot, node=source, dim=merged[0])
    # The axis is part of a larger one (batch and frames, windows of an image): it ends here.
    return spot.layout((spot.length,)) if spot.grid else None


def _merged(
    spot: _Spot, source: fx.Node, sizes: list[int], dims: list[int]
) -> _Spot | TokenLayout | None:
    """Several axes were flattened: the grid, unless the first or the last splits further."""
    whole = all(isinstance(n, int) for n in sizes) and not spot.start
    if not whole or math.prod(sizes) != spot.length:
        return None
    if len(sizes) + len(spot.grid) > 3:
        return None
    if len(sizes) + len(spot.grid) == 3:
        return spot.layout(sizes)
    inner = replace(spot, node=source, dim=dims[-1], length=sizes[-1])
    found = _follow(inner)
    if found is not None and len(found) == 2 and not spot.grid:
        return spot.layout((sizes[0], *found))
    outer = _follow(replace(spot, node=source, dim=dims[0], length=sizes[0]))
    if outer is not None and len(outer) == 2 and not spot.grid:
        return spot.layout((*outer, sizes[-1]))
    return spot.layout(sizes)


def _follow(spot: _Spot) -> tuple[int, ...] | None:
    """The axes that one axis of a grid came from, where it was flattened earlier."""
    place: _Spot = replace(spot, text=0, suffix=0, grid=())
    for _ in range(_STEPS):
        step = _back(place)
        if not isinstance(step, _Spot):
            return step.grid if step is not None and not (step.text or step.suffix) else None
        place = step
    return None


def _groups(before: Sequence[Any], after: Sequence[Any]) -> list[tuple[list[int], list[int]]]:
    """Dimensions of a reshape that belong together: the smallest runs of equal product.

    Dynamic sizes belong together where they are the same symbol at the same end of both shapes.
    """
    first = 0
    while first < min(len(before), len(after)) and _equal(before[first], after[first]):
        first += 1
    last = 0
    room = min(len(before), len(after)) - first
    while last < room and _equal(before[-1 - last], after[-1 - last]):
        last += 1
    groups = [([n], [n]) for n in range(first)]
    groups += _runs(before, after, first, last)
    ends = (len(before), len(after))
    return groups + [([ends[0] - n], [ends[1] - n]) for n in range(last, 0, -1)]


def _shape(node: fx.Node) -> tuple[Any, ...]:
    """The shape of a node; symbols that stand for one number become it."""
    return tuple(int(str(n)) if str(n).isdigit() else n for n in shape_of(node))


def _equal(first: Any, second: Any) -> bool:
    return str(first) == str(second)


def _runs(
    before: Sequence[Any], after: Sequence[Any], first: int, last: int
) -> list[tuple[list[int], list[int]]]:
    """`_groups` of what lies between the dimensions that stayed."""
    i, j = first, first
    end_i, end_j = len(before) - last, len(after) - last
    if not all(isinstance(n, int) for n in (*before[i:end_i], *after[j:end_j])):
        return [(list(range(i, end_i)), list(range(j, end_j)))]
    groups: list[tuple[list[int], list[int]]] = []
    while i < end_i or j < end_j:
        left: list[int] = []
        right: list[int] = []
        a = b = 1
        while not (left or right) or a != b:
            if a <= b and i < end_i:
                a, left, i = a * before[i], [*left, i], i + 1
            elif j < end_j:
                b, right, j = b * after[j], [*right, j], j + 1
            else:
                a, left, i = a * before[i], [*left, i], i + 1
        groups.append((left, right))
    return groups


def _permuted(spot: _Spot) -> _Spot | None:
    from attn_rewrite.passes.find.layout import permutation

    source = _source(spot)
    if source is None:
        return None
    order = permutation(spot.node, len(_shape(source)))
    return replace(spot, node=source, dim=order[spot.dim])


def _cat(spot: _Spot) -> _Spot | TokenLayout | None:
    """Other tokens are put before or after: follow the longest part."""
    parts = spot.node.args[0]
    dim = spot.node.args[1] if len(spot.node.args) > 1 else spot.node.kwargs.get("dim", 0)
    assert isinstance(parts, (list, tuple))
    nodes: list[Any] = [p for p in parts if is_tensor(p)]
    if not nodes or not isinstance(dim, int):
        return None
    if dim % len(_shape(spot.node)) != spot.dim:
        return _onward(spot)
    sizes = [_shape(p)[spot.dim] for p in nodes]
    if not all(isinstance(n, int) for n in sizes):
        return None
    if sum(sizes) != spot.length:
        return _part_of(spot, nodes, sizes)
    at = max(range(len(sizes)), key=lambda n: sizes[n])
    return replace(
        spot,
        node=nodes[at],
        length=sizes[at],
        text=spot.text + sum(sizes[:at]),
        suffix=spot.suffix + sum(sizes[at + 1 :]),
    )


def _part_of(spot: _Spot, nodes: Sequence[Any], sizes: Sequence[int]) -> _Spot | None:
    """The part of a concatenation that a later slice takes, whole or some of it."""
    first = 0
    for node, size in zip(nodes, sizes, strict=True):
        if first <= spot.start and spot.start + spot.length <= first + size:
            return replace(spot, node=node, start=spot.start - first)
        first += size
    return None


def _sliced(spot: _Spot) -> _Spot | TokenLayout | None:
    source = _source(spot)
    given = arguments(spot.node)
    if source is None or not isinstance(given.get("dim", 0), int):
        return None
    if given.get("dim", 0) % len(_shape(source)) != spot.dim:
        return replace(spot, node=source)
    start, step = given.get("start") or 0, given.get("step", 1)
    size = _shape(source)[spot.dim]
    if not isinstance(start, int) or not isinstance(size, int) or step != 1:
        return None
    return replace(spot, node=source, start=spot.start + (start + size if start < 0 else start))


def _dimension(spot: _Spot) -> _Spot | None:
    source = _source(spot)
    if source is None:
        return None
    at = spot.node.args[1] if len(spot.node.args) > 1 else spot.node.kwargs.get("dim")
    if not isinstance(at, int):
        return None
    name = op_name(spot.node)
    rank = len(_shape(source)) + (name == "unsqueeze")
    at %= rank
    if name == "unsqueeze":
        return replace(spot, node=source, dim=spot.dim - (spot.dim > at))
    return replace(spot, node=source, dim=spot.dim + (spot.dim >= at))


def _embedded(spot: _Spot) -> TokenLayout | None:
    """A convolution made the axis: with nothing found before, it is no grid by itself."""
    return spot.layout((spot.length,)) if spot.grid else None
