"""Heads that are picked by index, or one by one and put together again -> repeats.

Keys of grouped queries: ``k[:, head // group]``, ``cat([k[:, 0:1]] * group + ...)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from attn_rewrite.graph import GraphBuilder, arguments, aten, is_call, is_tensor, op_name, shape_of
from attn_rewrite.passes.canonicalize.base import Canonicalization
from attn_rewrite.passes.find.constants import Constants
from attn_rewrite.passes.transform import Exactness
from attn_rewrite.sizes import as_size, same_size

_MAX_PARTS = 512


def _repeated(
    source: fx.Node, dim: int, picked: Sequence[int], build: GraphBuilder
) -> fx.Node | None:
    """``source`` with the places ``picked`` along ``dim``, where each comes equally often."""
    size = shape_of(source)[dim]
    if not isinstance(size, int) or len(picked) % size or len(picked) <= size:
        return None
    times = len(picked) // size
    if list(picked) == [i // times for i in range(len(picked))]:
        return build.call(aten.repeat_interleave.self_int, source, times, dim)  # type: ignore[no-any-return]
    if list(picked) == [i % size for i in range(len(picked))]:
        every = [times if i == dim else 1 for i in range(len(shape_of(source)))]
        return build.call(aten.repeat.default, source, every)  # type: ignore[no-any-return]
    return None


@dataclass(frozen=True)
class RepeatByIndex(Canonicalization):
    """An index that names every head equally often, in order."""

    name: ClassVar[str] = "repeat-by-index"
    exactness: ClassVar[Exactness] = Exactness.EXACT
    targets: ClassVar[frozenset[str]] = frozenset({"index", "index_select"})

    def rewrite(self, node: fx.Node, build: GraphBuilder) -> fx.Node | None:
        """Rewrite an index over one axis that is made of fixed sizes."""
        named = arguments(node)
        source = named["self"]
        if op_name(node) == "index":
            places = [i for i, x in enumerate(named["indices"]) if x is not None]
            if len(places) != 1:
                return None
            dim, index = places[0], named["indices"][places[0]]
        else:
            dim, index = named["dim"] % len(shape_of(source)), named["index"]
        if not is_tensor(index) or len(shape_of(index)) != 1:
            return None
        value = Constants(node.graph.owning_module).value(index)
        if value is None or value.dtype not in (torch.int64, torch.int32):
            return None
        return _repeated(source, dim, value.tolist(), build)


@dataclass(frozen=True)
class RepeatByParts(Canonicalization):
    """Heads of one tensor, taken one by one and put together again, every one equally often."""

    name: ClassVar[str] = "repeat-by-parts"
    exactness: ClassVar[Exactness] = Exactness.EXACT
    targets: ClassVar[frozenset[str]] = frozenset({"cat", "stack"})

    def rewrite(self, node: fx.Node, build: GraphBuilder) -> fx.Node | None:
        """Rewrite slices and selections along the axis that they are put together on."""
        named = arguments(node)
        dim = named["dim"] % len(shape_of(node))
        parts = named["tensors"]
        if not 1 < len(parts) <= _MAX_PARTS:
            return None
        picked: list[int] = []
        sources: dict[fx.Node, None] = {}
        for part in parts:
            found = _picked(part, dim, stacked=op_name(node) == "stack")
            if found is None:
                return None
            source, places = found
            sources[source] = None
            picked += places
        return _repeated(next(iter(sources)), dim, picked, build) if len(sources) == 1 else None


def _picked(part: Any, dim: int, *, stacked: bool) -> tuple[fx.Node, list[int]] | None:
    """(source, places along ``dim``) of one part."""
    if stacked:
        return _selected(part, dim)
    times, part = _expanded(part, dim)
    if not is_call(part, "slice"):
        return None
    named = arguments(part)
    first, length = named["start"] or 0, shape_of(part)[dim]
    if named["dim"] % len(shape_of(part)) != dim or named["step"] != 1:
        return None
    if not isinstance(first, int) or first < 0 or not isinstance(length, int):
        return None
    if times > 1 and length != 1:
        return None
    return _whole(named["self"]), list(range(first, first + length)) * times


def _selected(part: Any, dim: int) -> tuple[fx.Node, list[int]] | None:
    if not is_call(part, "select"):
        return None
    named = arguments(part)
    source, index = named["self"], named["index"]
    size = shape_of(source)[dim] if len(shape_of(source)) > dim else None
    if named["dim"] % len(shape_of(source)) != dim:
        return None
    if not isinstance(size, int) or not isinstance(index, int):
        return None
    return _whole(source), [index % size]


def _expanded(part: Any, dim: int) -> tuple[int, Any]:
    """(times, source) of a part that is expanded along ``dim`` alone; once, if it is not."""
    if not is_call(part, "expand"):
        return 1, part
    inner, whole = shape_of(part.args[0]), shape_of(part)
    if len(inner) != len(whole) or not isinstance(whole[dim], int) or inner[dim] != 1:
        return 1, part
    pairs = (p for i, p in enumerate(zip(inner, whole, strict=True)) if i != dim)
    if all(same_size(as_size(a), as_size(b)) for a, b in pairs):
        return whole[dim], part.args[0]
    return 1, part


def _whole(node: fx.Node) -> fx.Node:
    """What a slice that takes everything is of."""
    while is_call(node, "slice"):
        source = node.args[0]
        assert isinstance(source, fx.Node)
        pairs = zip(shape_of(source), shape_of(node), strict=True)
        if arguments(node)["step"] != 1 or not all(
            same_size(as_size(a), as_size(b)) for a, b in pairs
        ):
            return node
        node = source
    return node
