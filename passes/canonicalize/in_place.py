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

from attn_rewrite.graph import TRANSPARENT, GraphBuilder, arguments, aten, op_name, shape_of
from attn_rewrite.passes.canonicalize.base import Canonicalization
from attn_rewrite.passes.transform import Exactness

# ``add_`` and ``__iand__`` write, ``__and__`` does not.
_WRITES = frozenset(
    name
    for name in (n.removeprefix("aten::") for n in torch._C._dispatch_get_all_op_names())
    for name in [name.partition(".")[0]]
    if name.startswith("__i") or (name.endswith("_") and not name.endswith("__"))
)
# Operators whose result is, or may be, the memory of their first operand.
_VIEWS = TRANSPARENT | frozenset(
    "view reshape transpose permute unsqueeze squeeze expand slice select split chunk unbind t "
    "getitem flatten unflatten detach contiguous to alias narrow diagonal as_strided view_as "
    "expand_as reshape_as swapaxes swapdims movedim moveaxis unfold numpy_T mT mH tensor_split "
    "split_with_sizes hsplit vsplit dsplit real imag view_as_real view_as_complex ravel lift_fresh "
    "_reshape_alias _to_copy type_as atleast_1d atleast_2d atleast_3d squeeze_ unsqueeze_".split()
)


@dataclass(frozen=True)
class InPlace(Canonicalization):
    """Functionalise a write to a tensor that the graph made."""

    name: ClassVar[str] = "in-place"
    exactness: ClassVar[Exactness] = Exactness.EXACT
    targets: ClassVar[frozenset[str]] = _WRITES

    def rewrite(self, node: fx.Node, build: GraphBuilder) -> fx.Node | None:
        """The written tensor as a value; ``node`` itself where the write stays."""
        written = node.args[0] if node.args else None
        if not isinstance(written, fx.Node) or not isinstance(node.target, torch._ops.OpOverload):
            return None
        chain = _chain(written)
        if chain[-1].op != "call_function":
            return None  # an input or a buffer: a leaf of every site, read where the kernel stands
        readers = {m: _later(m, node) for m in _aliases(chain[-1], node)}
        levels = _levels(node, chain, {m for m, users in readers.items() if users}, build)
        if levels is None:
            return _separate(node, readers, build)
        for member, value in levels.items():
            if member is not written and value is not levels[written]:
                value.meta["origin"] = member.meta.get("origin")
            for user in readers[member]:
                user.replace_input_with(member, value)
        return levels[written]


def _chain(node: fx.Node) -> list[fx.Node]:
    """A tensor and what it is a view of, up to the operator that made the memory."""
    chain = [node]
    while op_name(chain[-1]) in _VIEWS | _WRITES and isinstance(chain[-1].args[0], fx.Node):
        chain.append(chain[-1].args[0])
    return chain


def _aliases(root: fx.Node, before: fx.Node) -> list[fx.Node]:
    """``root`` and the views of its memory that were taken before a write, in the graph's order."""
    found = dict.fromkeys([root])
    stack = [root]
    while stack:
        for user in stack.pop().users:
            views = op_name(user) in _VIEWS | _WRITES and user.args and user.args[0] in found
            if views and user < before and user not in found:
                found[user] = None
                stack.append(user)
    return list(found)


def _later(member: fx.Node, write: fx.Node) -> list[fx.Node]:
    return [user for user in member.users if write < user]


def _levels(
    write: fx.Node, chain: list[fx.Node], read: set[fx.Node], build: GraphBuilder
) -> dict[fx.Node, fx.Node] | None:
    """The new value of the written view and of all above it that is read later; None if there is
    no operator to say one of them, or if a view beside the chain is read."""
    value = _result(write, build)
    if value is None or not read <= set(chain):
        return None
    top = max((chain.index(m) for m in read), default=0)
    levels = {chain[0]: value}
    for view, whole in itertools.pairwise(chain[: top + 1]):
        value = _put_back(view, whole, value, build)
        if value is None:
            return None
        levels[whole] = value
    return levels


def _result(write: fx.Node, build: GraphBuilder) -> fx.Node | None:
    """What a write leaves in the view that it is given."""
    target, written = write.target, write.args[0]
    assert isinstance(target, torch._ops.OpOverload)
    assert isinstance(written, fx.Node)
    if op_name(write) == "copy_":
        source = write.args[1]
        if isinstance(source, fx.Node) and _alike(source, written):
            return build.call(aten.alias.default, source)  # type: ignore[no-any-return]
    functional = _out_of_place(target)
    if functional is None:
        return None
    return build.call(functional, *write.args, **write.kwargs)  # type: ignore[no-any-return]


def _alike(a: fx.Node, b: fx.Node) -> bool:
    one, other = a.meta.get("val"), b.meta.get("val")
    if not isinstance(one, torch.Tensor) or not isinstance(other, torch.Tensor):
        return False
    return one.dtype == other.dtype and _same_shape(a, b)


def _same_shape(a: fx.Node, b: fx.Node) -> bool:
    """Of equal sizes whatever the inputs; sizes that would need a guard are not."""
    one, other = shape_of(a), shape_of(b)
    return len(one) == len(other) and all(str(x) == str(y) for x, y in zip(one, other, strict=True))


def _put_back(view: fx.Node, whole: fx.Node, value: fx.Node, build: GraphBuilder) -> fx.Node | None:
    """``whole`` with ``value`` in the place of ``view``."""
    name, named = op_name(view), arguments(view)
    if name in ("slice", "alias") and named.get("step", 1) == 1 and _same_shape(view, whole):
        return value
    if name == "slice":
        at = [named[n] for n in ("dim", "start", "end", "step")]
        return build.call(aten.slice_scatter.default, whole, value, *at)  # type: ignore[no-any-return]
    if name == "select":
        at = [named["dim"], named["index"]]
        return build.call(aten.select_scatter.default, whole, value, *at)  # type: ignore[no-any-return]
    return None


def _separate(
    write: fx.Node, readers: dict[fx.Node, list[fx.Node]], build: GraphBuilder
) -> fx.Node | None:
    """Keep a write; its later readers read copies that are made after it."""
    if op_name(write) in _VIEWS or (not any(readers.values()) and not write.users):
        return None
    build.at(write.next)
    for member, users in {**readers, write: list(write.users)}.items():
        if not users or not isinstance(member.meta.get("val"), torch.Tensor):
            continue
        copy = build.call(aten.copy.default, member, member)
        copy.meta["origin"] = member.meta.get("origin")
        for user in users:
            user.replace_input_with(member, copy)
    return write


def _out_of_place(target: torch._ops.OpOverload) -> Any:
    packet = getattr(aten, target._schema.name.removeprefix("aten::").removesuffix("_"), None)
    return getattr(packet, target._overloadname, None)
