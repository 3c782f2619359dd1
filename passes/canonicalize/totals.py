"""Sums over an axis in other words: the last of a running sum, the mean times the length, a product
with a column of ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from attn_rewrite.graph import (
    GraphBuilder,
    arguments,
    aten,
    is_call,
    is_tensor,
    op_name,
    shape_of,
    through,
    value_of,
)
from attn_rewrite.passes.canonicalize.base import Canonicalization
from attn_rewrite.sizes import as_size, same_size


@dataclass(frozen=True)
class LastOfRunningSum(Canonicalization):
    """``x.cumsum(dim)[..., -1:]`` is the sum."""

    name: ClassVar[str] = "last-of-running-sum"
    targets: ClassVar[frozenset[str]] = frozenset({"slice", "select"})

    def rewrite(self, node: fx.Node, build: GraphBuilder) -> fx.Node | None:
        """Rewrite the last element along the axis that is summed up."""
        named = arguments(node)
        running = named["self"]
        if not is_call(running, "cumsum") or not shape_of(running):
            return None
        inner, rank = arguments(running), len(shape_of(running))
        if inner["dim"] % rank != named["dim"] % rank or inner.get("dtype") is not None:
            return None
        length = shape_of(running)[inner["dim"]]
        first = named["index"] if op_name(node) == "select" else named["start"]
        if first != -1 and not (isinstance(length, int) and first == length - 1):
            return None
        kept = op_name(node) == "slice"
        if kept and (
            named["step"] != 1
            or not same_size(as_size(shape_of(node)[inner["dim"]]), 1)
            or same_size(as_size(length), 1)
        ):
            return None
        args = (inner["self"], [inner["dim"]], kept)
        return build.call(aten.sum.dim_IntList, *args)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class MeanTimesLength(Canonicalization):
    """``x.mean(dim) * x.shape[dim]`` is the sum."""

    name: ClassVar[str] = "mean-times-length"
    targets: ClassVar[frozenset[str]] = frozenset({"mul"})

    def rewrite(self, node: fx.Node, build: GraphBuilder) -> fx.Node | None:
        """Rewrite where the factor is the length of the one axis of the mean."""
        for mean, factor in (node.args[:2], node.args[1::-1]):
            if not is_call(mean, "mean"):
                continue
            named = arguments(mean)  # type: ignore[arg-type]
            dims = named.get("dim")
            where = [dims] if isinstance(dims, int) else list(dims or ())
            if len(where) != 1 or named.get("dtype") is not None:
                continue
            if _is_size(factor, shape_of(named["self"])[where[0]]):
                args = (named["self"], where, bool(named.get("keepdim")))
                return build.call(aten.sum.dim_IntList, *args)  # type: ignore[no-any-return]
        return None


def _is_size(factor: Any, size: Any) -> bool:
    """A number, or the size of a tensor, that equals ``size`` for every length."""
    value = factor.meta.get("val") if isinstance(factor, fx.Node) else factor
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if is_tensor(factor) or value is None or isinstance(value, (bool, float)):
        return False
    return same_size(as_size(value), as_size(size))


@dataclass(frozen=True)
class ColumnsOfProduct(Canonicalization):
    """``(x @ cat([v, w], -1))[..., a:b]`` is ``x @ v`` where the columns are those of v; a product
    with one column of ones is the sum."""

    name: ClassVar[str] = "columns-of-product"
    targets: ClassVar[frozenset[str]] = frozenset({"slice", "select", "getitem"})

    def rewrite(self, node: fx.Node, build: GraphBuilder) -> fx.Node | None:
        """Rewrite where the columns of the result are exactly those of one part."""
        found = _columns(node)
        if found is None:
            return None
        product, first, count, kept = found
        at, match = 0, None
        for part, width in _parts(product.args[1]):
            match = (part,) if (at, width) == (first, count) else match
            at += width
        if match is None:
            return None
        (part,) = match
        left = product.args[0]
        if part is None:
            if not _same_rows(left, product):
                return None
            return build.call(aten.sum.dim_IntList, left, [-1], kept)  # type: ignore[no-any-return]
        assert callable(product.target)
        result = build.call(product.target, left, part)
        return result if kept else build.call(aten.squeeze.dim, result, -1)  # type: ignore[no-any-return]


def _columns(node: fx.Node) -> tuple[fx.Node, int, int, bool] | None:
    """(product, first column, number of columns, axis kept) of columns of a matrix product."""
    source: Any = node.args[0]
    if op_name(node) == "getitem":
        if not is_call(source, "split", "split_with_sizes", "tensor_split"):
            return None
        index, whole = node.args[1], source.args[0]
        if not is_call(whole, "matmul", "bmm") or arguments(source)["dim"] % _rank(whole) != (
            _rank(whole) - 1
        ):
            return None
        widths = [p.shape[-1] for p in value_of(source)]
        if not isinstance(index, int) or not all(isinstance(w, int) for w in widths):
            return None
        return whole, sum(widths[:index]), widths[index], True
    if not is_call(source, "matmul", "bmm"):
        return None
    named, rank = arguments(node), _rank(source)
    total = shape_of(source)[-1]
    if named["dim"] % rank != rank - 1 or not isinstance(total, int):
        return None
    if op_name(node) == "select":
        return source, named["index"] % total, 1, False
    start = named["start"] or 0
    if named["step"] != 1 or not isinstance(start, int):
        return None
    first = start % total if start < 0 else start
    return source, first, int(shape_of(node)[-1]), True


def _same_rows(left: Any, product: fx.Node) -> bool:
    """The product has the rows of its left operand: the right one brings no batch of its own."""
    mine, whole = shape_of(left)[:-1], shape_of(product)[:-1]
    return len(mine) == len(whole) and all(
        same_size(as_size(a), as_size(b)) for a, b in zip(mine, whole, strict=True)
    )


def _rank(node: fx.Node) -> int:
    return len(shape_of(node))


def _parts(value: Any) -> list[tuple[Any, int]]:
    """The tensors that stand side by side in ``value``, with widths; None for a column of ones."""
    if is_call(value, "cat") and len(shape_of(value)) >= 2:
        named, rank = arguments(value), len(shape_of(value))
        if named["dim"] % rank == rank - 1:
            parts = named["tensors"]
            return [(None if _is_ones(p) else p, int(shape_of(p)[-1])) for p in parts]
    if is_call(value, "pad", "constant_pad_nd") and arguments(value).get("mode", "constant") == (
        "constant"
    ):
        named = arguments(value)
        source = named["self"]
        if list(named["pad"]) == [0, 1] and named.get("value") == 1:
            return [(source, int(shape_of(source)[-1])), (None, 1)]
    return []


def _is_ones(node: Any) -> bool:
    """One column of ones."""
    node = through(node, "expand", "to", "clone", "contiguous")
    if not is_tensor(node) or not same_size(
        as_size(shape_of(node)[-1] if shape_of(node) else 0), 1
    ):
        return False
    if is_call(node, "ones", "ones_like", "new_ones"):
        return True
    return is_call(node, "full", "full_like", "new_full") and arguments(node)["fill_value"] == 1
