"""How keys were cached: appended to what was there, or written at positions that are data.

The keys need not be what was cached: they may be made of it row by row, as those of multi-head
latent attention are projected from cached latents, or rotated after the cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import fx

from attn_rewrite.graph import arguments, is_call, is_parameter, is_tensor, op_name, shape_of
from attn_rewrite.passes.find.axes import Axes
from attn_rewrite.passes.find.facts import PROJECTIONS, laid_out
from attn_rewrite.passes.find.layout import Dims, pull
from attn_rewrite.site import Operand
from attn_rewrite.sizes import as_size, same_size

# Each row of the result is of the same row of the first input, which is normalised or projected.
_BY_ROWS = frozenset({"linear", "layer_norm", "rms_norm"})
# Each row of the result is of the same row of every input that has it.
_BY_ELEMENTS = frozenset({"add", "sub", "mul", "div", "neg", "cat", "slice_scatter"})
_STEPS = 64


def written_at(key: Operand, q_len: object) -> fx.Node | None:
    """Where the keys of the queries were written into a cache of fixed size: the index tensor [q].

    ``index_copy(cache, kv, index, new)`` and ``cache[:, :, index] = new``.  Key ``index[i]`` is the
    one of query i, so this is the position of the query among the keys, also in a cache that rolls.
    None where the keys are not written like that, or are not as many as the queries.
    """
    for node, place in _rows(key):
        index = _index(node, place)
        if index is not None:
            return index if same_size(as_size(shape_of(index)[0]), as_size(q_len)) else None
    return None


def _index(node: fx.Node, place: int) -> fx.Node | None:
    """The one-dimensional index at which ``node`` writes along its dimension ``place``."""
    if not is_call(node, "index_copy", "index_copy_", "index_put", "index_put_"):
        return None
    named = arguments(node)
    index: Any
    if is_call(node, "index_copy", "index_copy_"):
        index = named["index"] if named["dim"] % len(shape_of(node)) == place else None
    else:
        at = [i for i, x in enumerate(named["indices"]) if x is not None]
        index = named["indices"][place] if at == [place] and not named["accumulate"] else None
    return index if is_tensor(index) and len(shape_of(index)) == 1 else None


def appended_to_cache(key: Operand, q_len: object) -> bool:
    """True if the keys are, row by row, of a cache with the newest ones appended: ``cat([past,
    new])`` along kv, one new row for each query."""
    return any(_appends(node, place, q_len) for node, place in _rows(key))


def _appends(node: fx.Node, place: int, q_len: object) -> bool:
    if not is_call(node, "cat") or not _joins(node, place):
        return False
    parts = arguments(node)["tensors"]
    if len(parts) != 2 or not same_size(as_size(shape_of(parts[1])[place]), as_size(q_len)):
        return False
    if laid_out(parts[0]).op == "placeholder":
        return True
    return same_size(as_size(q_len), 1) and op_name(parts[0]) not in PROJECTIONS


def _joins(node: fx.Node, place: int) -> bool:
    """True for a ``cat`` or ``slice_scatter`` along ``place``: its rows are not those of a part."""
    dim = arguments(node)["dim"]
    return isinstance(dim, int) and dim % len(shape_of(node)) == place


def _rows(key: Operand) -> Iterator[tuple[fx.Node, int]]:
    """Tensors that the keys are made of row by row, nearest first, each with its dimension of
    rows."""
    start = next((i for i, d in enumerate(key.dims) if [f.role for f in d] == ["kv"]), None)
    if start is None:
        return
    axes = Axes()
    row = axes.line(shape_of(key.node)[start])
    first: Dims = tuple(
        row if i == start else axes.fresh(size) for i, size in enumerate(shape_of(key.node))
    )
    queue, seen = [(key.node, first)], {key.node}
    while queue and len(seen) < _STEPS:
        node, dims = queue.pop(0)
        if row not in dims or axes.resolve(row) != row:
            continue
        place = dims.index(row)
        yield node, place
        moved = pull(node, dims, axes)
        before = [moved] if moved is not None else _inputs(node, place, dims, axes)
        queue += [(n, d) for n, d in before if n not in seen]
        seen |= {n for n, _ in before}


def _inputs(node: fx.Node, place: int, dims: Dims, axes: Axes) -> list[tuple[fx.Node, Dims]]:
    """What each row of ``node`` is computed from, at that row."""
    name = op_name(node).removesuffix("_")
    sources: list[fx.Node] = []
    if name in _BY_ROWS and place < len(dims) - 1:
        sources = node.all_input_nodes[:1]
    elif name == "copy":
        sources = node.all_input_nodes[1:2]
    elif name in _BY_ELEMENTS and not (name in ("cat", "slice_scatter") and _joins(node, place)):
        sources = [n for n in node.all_input_nodes if is_tensor(n) and not is_parameter(n)]
    whole, out = shape_of(node), []
    for source in sources:
        own = shape_of(source)
        skipped = len(whole) - len(own)
        if skipped > place or not same_size(as_size(own[place - skipped]), as_size(whole[place])):
            continue
        inner: Dims = tuple(
            d if same_size(as_size(s), as_size(w)) else axes.fresh(s)
            for s, w, d in zip(own, whole[skipped:], dims[skipped:], strict=True)
        )
        out.append((source, inner))
    return out
