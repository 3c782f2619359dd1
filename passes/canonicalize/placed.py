"""Values put in by index or at the border -> what they mean: ``x[mask] = c`` fills, one padded
column is a concatenated one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from attn_rewrite.graph import (
    GraphBuilder,
    arguments,
    aten,
    is_call,
    is_tensor,
    live_users,
    shape_of,
    value_of,
)
from attn_rewrite.passes.canonicalize.base import Canonicalization


@dataclass(frozen=True)
class BooleanIndex(Canonicalization):
    """``x[..., mask] = c`` is ``masked_fill(x, mask, c)``."""

    name: ClassVar[str] = "boolean-index"
    targets: ClassVar[frozenset[str]] = frozenset({"index_put"})

    def rewrite(self, node: fx.Node, build: GraphBuilder) -> fx.Node | None:
        """Rewrite where one mask covers the last axes and one number is put in."""
        named = arguments(node)
        source, indices, value = named["self"], list(named["indices"]), named["values"]
        if named["accumulate"] or any(i is not None for i in indices[:-1]):
            return None
        mask = indices[-1]
        if not is_tensor(mask) or value_of(mask).dtype != torch.bool or not is_tensor(value):
            return None
        before = len(indices) - 1
        if before + len(shape_of(mask)) != len(shape_of(source)) or value_of(value).numel() != 1:
            return None
        if shape_of(value):
            value = build.call(aten.squeeze.default, value)
        return build.call(aten.masked_fill.Tensor, source, mask, value)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class PaddedColumn(Canonicalization):
    """``pad(scores, (0, 1))`` before a softmax is a sink's column."""

    name: ClassVar[str] = "padded-column"
    targets: ClassVar[frozenset[str]] = frozenset({"pad", "constant_pad_nd"})

    def rewrite(self, node: fx.Node, build: GraphBuilder) -> fx.Node | None:
        """Rewrite one column on one side of the last axis, read by a softmax over that axis."""
        named = arguments(node)
        source, widths = named["self"], list(named["pad"])
        if widths not in ([0, 1], [1, 0]) or named.get("mode", "constant") != "constant":
            return None
        users = live_users(node)
        last = len(shape_of(node)) - 1
        if not users or not all(
            is_call(u, "softmax", "_softmax") and arguments(u)["dim"] % (last + 1) == last
            for u in users
        ):
            return None
        place = build.call(aten.slice.Tensor, source, last, 0, 1)
        column = build.call(aten.full_like.default, place, named.get("value") or 0.0)
        parts = [source, column] if widths == [0, 1] else [column, source]
        return build.call(aten.cat.default, parts, last)  # type: ignore[no-any-return]
