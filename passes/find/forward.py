"""From the probabilities to the value product: one way out, or a refusal that says why."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import fx

from attn_rewrite.cascade.expr import FALSE, Expr, call, where
from attn_rewrite.cascade.simplify import simplify
from attn_rewrite.graph import (
    arguments,
    is_tensor,
    live_users,
    op_name,
    rounds,
    shape_of,
    truncates,
)
from attn_rewrite.passes.find.anchor import Anchor, ValueProduct, refuse
from attn_rewrite.passes.find.axes import Atoms
from attn_rewrite.passes.find.layout import coordinate, push
from attn_rewrite.passes.find.product import Product, product_of
from attn_rewrite.site import Refusal
from attn_rewrite.sizes import as_size, same_size


@dataclass(frozen=True, eq=False)
class Probabilities:
    """A node on the way, its axes, and what was done to the probabilities so far."""

    node: fx.Node
    dims: tuple[Atoms, ...]
    weight: Expr | None = None
    dropout: float = 0.0
    sink: bool = False  # the column of the sink is still there


@dataclass(frozen=True, eq=False)
class Forward:
    """The end of the way: the value product, the post-softmax factor and the dropout
    probability."""

    value: ValueProduct
    weight: Expr | None
    dropout: float


def follow(anchor: Anchor) -> Forward | Refusal:
    """Follow the probabilities of ``anchor`` to the product with V."""
    if anchor.value is not None:
        return Forward(anchor.value, None, anchor.dropout)
    here = Probabilities(anchor.node, anchor.dims, sink=anchor.sink is not None)
    while True:
        users = live_users(here.node)
        if not users:
            return refuse("unused", "the probabilities are not used", here.node)
        if len(users) > 1 or users[0].op == "output":
            return _escape(users, here.node)
        user = users[0]
        product = product_of(user)
        if product is not None:
            return _finish(anchor, here, product)
        step = _step(anchor, here, user)
        if isinstance(step, Refusal):
            return step
        here = step


def _escape(users: list[fx.Node], node: fx.Node) -> Refusal:
    out = next((u for u in users if u.op == "output"), None)
    if out is not None:
        return refuse(
            "probabilities-escape", "the probabilities are returned as an output of the model", node
        )
    names = ", ".join(u.name for u in users)
    return refuse(
        "probabilities-escape", f"the probabilities are used in {len(users)} places: {names}", node
    )


def _step(anchor: Anchor, here: Probabilities, user: fx.Node) -> Probabilities | Refusal:
    name = op_name(user)
    if name in ("dropout", "dropout_", "nan_to_num"):
        named = arguments(user)
        p = float(named["p"]) if name != "nan_to_num" and named["train"] else 0.0
        if p and here.dropout:
            return refuse("two-dropouts", "the probabilities pass through two dropouts", user)
        return replace(here, node=user, dropout=here.dropout or p)
    if here.sink and _drops_last_key(anchor, here, user):
        return replace(here, node=user, sink=False)
    if user.args and user.args[0] is here.node:
        moved = push(user, here.dims, anchor.axes)
        if moved is not None and truncates(user):
            reason = "the probabilities are cast to whole numbers before the value product"
            return refuse("probabilities-truncated", reason, user)
        if moved is not None:
            return replace(here, node=user, dims=moved)
    factor = _factor(anchor, here, user)
    if factor is not None:
        weight = factor if here.weight is None else here.weight * factor
        return replace(here, node=user, weight=simplify(weight))
    if name in ("add", "add_", "sub"):
        reason = "the probabilities are added to another tensor before the value product"
        return refuse("probabilities-summed", reason, user)
    return refuse(
        "not-a-value-product",
        f"the probabilities go into {name or user.op}, not into a product",
        user,
    )


def _drops_last_key(anchor: Anchor, here: Probabilities, user: fx.Node) -> bool:
    """``p[..., :-1]`` (or ``1:``): the column of the sink is taken away again."""
    if op_name(user) != "slice" or user.args[0] is not here.node:
        return False
    named = arguments(user)
    place = here.dims.index(anchor.keys)
    length = as_size(shape_of(user)[place])
    return (
        named["dim"] % len(here.dims) == place
        and (named["start"] or 0) == int(anchor.sink_first)
        and named["step"] == 1
        and same_size(length, anchor.axes.extent(anchor.keys))
    )


def _factor(anchor: Anchor, here: Probabilities, user: fx.Node) -> Expr | None:
    """The factor by which an elementwise operator multiplies the probabilities, or None."""
    name = op_name(user).removesuffix("_")
    lift = anchor.lifter.operand
    if name == "mul" and len(user.args) == 2:
        a, b = user.args
        other = b if a is here.node else a
        if is_tensor(other) and len(other.meta["val"].shape) > len(here.dims):  # type: ignore[union-attr]
            return None
        return lift(other, user, here.dims, 0)
    if name == "div" and user.args[0] is here.node and not rounds(user):
        divisor = user.args[1]
        if isinstance(divisor, (int, float)):
            return lift(1.0 / divisor, user, here.dims, 0)
    if name == "masked_fill" and user.args[0] is here.node:
        mask = lift(user.args[1], user, here.dims, 0)
        fill = lift(arguments(user)["value"], user, (), 0)
        return None if mask is None or not _is_zero(fill) else where(mask, 0.0, 1.0)
    if name in ("tril", "triu") and user.args[0] is here.node:
        row, column = (coordinate(d, anchor.axes) for d in here.dims[-2:])
        diagonal = arguments(user)["diagonal"]
        if row is None or column is None or not isinstance(diagonal, int):
            return None
        return where(call("le" if name == "tril" else "ge", column, row + diagonal), 1.0, 0.0)
    if name == "where":
        named = arguments(user)
        condition = lift(named["condition"], user, here.dims, 0)
        yes, no = named["self"], named["other"]
        other = no if yes is here.node else yes
        zero = lift(other, user, here.dims, 0)
        if condition is None or not _is_zero(zero):
            return None
        return where(condition, 1.0, 0.0) if yes is here.node else where(condition, 0.0, 1.0)
    return None


def _is_zero(value: Expr | None) -> bool:
    return value is not None and simplify(call("ne", value, 0)) == FALSE


def _finish(anchor: Anchor, here: Probabilities, product: Product) -> Forward | Refusal:
    if here.sink:
        reason = "the softmax has a further column that the value product reads as well"
        return refuse("sink-in-values", reason, product.node)
    axes = anchor.axes
    on_left = product.left is here.node
    if product.left is product.right:
        return refuse(
            "squared-probabilities",
            "the probabilities are multiplied with themselves",
            product.node,
        )
    p_labels = product.left_labels if on_left else product.right_labels
    v_labels = product.right_labels if on_left else product.left_labels
    value = product.right if on_left else product.left
    atoms = {x: d for x, d in zip(p_labels, here.dims, strict=True) if x}
    summed = {a for x in product.contracted for a in axes.resolve(atoms[x])}
    keys = set(axes.resolve(anchor.keys))
    if summed != keys:
        reason = "the product sums over another axis than the softmax normalises"
        return refuse("axis-mismatch", reason, product.node)
    sizes = product.sizes()
    new = [x for x in v_labels if x and x not in atoms]
    for label in new:
        atoms[label] = axes.fresh(sizes[label])
    features = tuple(a for x in new for a in atoms[x])
    out = ValueProduct(
        product.node,
        value,
        tuple(atoms[x] if x else () for x in v_labels),
        tuple(atoms[x] if x else () for x in product.out_labels),
        features,
    )
    return Forward(out, here.weight, here.dropout)
