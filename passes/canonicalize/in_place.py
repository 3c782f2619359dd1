"""``x.div_(c)`` -> ``div(x, c)``, and ``x[:, 1:] = y`` -> a scatter: writes become values.

Exact: the same operators out of place.  A later reader of the memory that was written reads the
result, by whichever view it looks.  Where a write cannot be said as a value it stays, and later
readers read a ``copy``, which no rule looks through: what was computed before the write is never
taken for what is read after it.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from attn_rewrite.graph import GraphBuilder, arguments, aten, is_tensor, op_name, shape_of, value_of
from attn_rewrite.memory import sharing, viewed, views_to_memory, written
from attn_rewrite.passes.canonicalize.base import WRITES, Canonicalization
from attn_rewrite.passes.transform import Exactness
from attn_rewrite.sizes import as_size, same_size

_Readers = dict[fx.Node, list[fx.Node]]


@dataclass(frozen=True)
class InPlace(Canonicalization):
    """Functionalise a write."""

    name: ClassVar[str] = "in-place"
    exactness: ClassVar[Exactness] = Exactness.EXACT
    targets: ClassVar[frozenset[str]] = frozenset({WRITES})

    def rewrite(self, node: fx.Node, build: GraphBuilder) -> fx.Node | None:
        """The written tensor as a value; ``node`` itself where the write stays."""
        readers = _readers(node)
        values = _values(node, readers, build)
        if values is None:
            return _separate(node, readers, build)
        target = written(node)[0]
        for member, value in values.items():
            if value is not values[target]:
                value.meta["origin"] = member.meta.get("origin")
            for user in readers[member]:
                user.replace_input_with(member, value)
        return values[target]


def _readers(write: fx.Node) -> _Readers:
    """The nodes whose memory a write may change, each with its users after the write.

    A view that is taken after the write counts as a reader, not as a view: it looks at the result.
    The parts of a split do not, whenever they are named.
    """
    found: _Readers = {}
    for target in written(write):
        for member in sharing(target):
            source = viewed(member)
            stale = source is not None and source in found and not is_tensor(source)
            if member is not write and (member < write or stale):
                found[member] = [u for u in member.users if write < u and not _is_barrier(u)]
    return {m: [u for u in us if u not in found] for m, us in found.items()}


def _values(
    write: fx.Node, readers: _Readers, build: GraphBuilder
) -> dict[fx.Node, fx.Node] | None:
    """The new value of the written view and of all above it that is read later; None if there is
    no operator to say one of them, or if a view beside the chain is read."""
    value = _result(write, build)
    if value is None:
        return None
    assert isinstance(write.target, torch._ops.OpOverload)
    chain = views_to_memory(written(write)[0])
    values = {chain[0]: value}
    if torch.Tag.inplace_view in write.target.tags:  # another shape for this view, no new elements
        return values
    read = {m for m, users in readers.items() if users}
    if not read <= set(chain):
        return None
    top = max((chain.index(m) for m in read), default=0)
    for view, whole in itertools.pairwise(chain[: top + 1]):
        value = _put_back(view, whole, value, build)
        if value is None:
            return None
        values[whole] = value
    return values


def _result(write: fx.Node, build: GraphBuilder) -> fx.Node | None:
    """What a write leaves in the one operand that it writes to, if that is its first."""
    target = write.target
    assert isinstance(target, torch._ops.OpOverload)
    if written(write) != write.args[:1]:
        return None
    if op_name(write) == "copy_" and _alike(write.args[1], write.args[0]):
        return build.call(aten.alias.default, write.args[1])  # type: ignore[no-any-return]
    functional = _out_of_place(target)
    if functional is None or not _fits(write):
        return None
    return build.call(functional, *write.args, **write.kwargs)  # type: ignore[no-any-return]


def _fits(write: fx.Node) -> bool:
    """False for a copy that is longer than where it goes, which only fails when it is run: a buffer
    that is assigned anew in its first call (timm's GPSA)."""
    if op_name(write) != "copy_" or not is_tensor(write.args[1]):
        return True
    target, source = (tuple(map(as_size, shape_of(n))) for n in write.args[:2])  # type: ignore[arg-type]
    return len(source) <= len(target) and all(
        same_size(s, t) or same_size(s, 1)
        for s, t in zip(reversed(source), reversed(target), strict=False)
    )


def _alike(a: Any, b: Any) -> bool:
    both = is_tensor(a) and is_tensor(b)
    return both and value_of(a).dtype == value_of(b).dtype and _same_shape(a, b)


def _same_shape(a: fx.Node, b: fx.Node) -> bool:
    one, other = (tuple(map(as_size, shape_of(n))) for n in (a, b))
    return len(one) == len(other) and all(map(same_size, one, other))


def _put_back(view: fx.Node, whole: fx.Node, value: fx.Node, build: GraphBuilder) -> fx.Node | None:
    """``whole`` with ``value`` in the place of ``view``."""
    name = op_name(view)
    if name == "alias" or (name == "slice" and _same_shape(view, whole) and _step(view) == 1):
        return value
    if name not in ("slice", "select"):
        return None
    named = arguments(view)
    at = [named[n] for n in (("dim", "index") if name == "select" else ("dim", "start", "end"))]
    if name == "select":
        return build.call(aten.select_scatter.default, whole, value, *at)  # type: ignore[no-any-return]
    return build.call(aten.slice_scatter.default, whole, value, *at, _step(view))  # type: ignore[no-any-return]


def _step(view: fx.Node) -> Any:
    return arguments(view)["step"]


def _separate(write: fx.Node, readers: _Readers, build: GraphBuilder) -> fx.Node | None:
    """Keep a write; its later readers read copies that are made after it."""
    users = [u for u in write.users if not _is_barrier(u)]
    read = {m: us for m, us in {**readers, write: users}.items() if us and is_tensor(m)}
    for member, users in read.items():
        build.at(max(member, write).next)
        copy = build.call(aten.copy.default, member, member)
        copy.meta["origin"] = member.meta.get("origin")
        for user in users:
            user.replace_input_with(member, copy)
    return write if read else None


def _is_barrier(node: fx.Node) -> bool:
    return op_name(node) == "copy" and node.args[0] is node.args[1]


def _out_of_place(target: torch._ops.OpOverload) -> Any:
    space, _, name = target._schema.name.partition("::")
    if space != "aten" or not name.endswith("_") or name.endswith("__"):
        return None
    return getattr(getattr(aten, name.removesuffix("_"), None), target._overloadname, None)
