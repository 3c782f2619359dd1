"""From a softmax to the products around it, through operators that mix or add whole maps.

What `match` follows keeps every axis of the probabilities; these walks also cross linear maps over
heads and sums of two maps, and say which of them they met (`Way.mixed`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from attn_rewrite.graph import (  # fmt: skip
    arguments,
    is_call,
    is_parameter,
    is_tensor,
    live_users,
    op_name,
    shape_of,
)
from attn_rewrite.passes.find.axes import Atoms, Axes
from attn_rewrite.passes.find.layout import pull, pure, push
from attn_rewrite.passes.find.product import Product, product_of
from attn_rewrite.sizes import as_size, same_size

_STEPS = 24
_ELEMENTWISE = frozenset(
    "add sub mul div to dropout neg where masked_fill clamp nan_to_num".split()
)
Dims = tuple[Atoms, ...]


@dataclass(frozen=True, eq=False)
class Way:
    """A tensor on the way between softmax and product; ``mixed`` names what was done to it
    there."""

    node: fx.Node
    dims: Dims
    mixed: str = ""


def start(node: fx.Node, axes: Axes) -> tuple[Way, Atoms]:
    """The softmax with fresh atoms for its axes, and the atoms it normalises over."""
    shape = shape_of(node)
    place = int(arguments(node)["dim"]) % len(shape)
    dims = tuple(axes.line(s) if i == place else axes.fresh(s) for i, s in enumerate(shape))
    return Way(node, dims), dims[place]


# From the softmax to the product that takes the probabilities


def to_product(way: Way, axes: Axes, keys: Atoms) -> tuple[Way, Product] | None:
    """Follow the probabilities to a product of activations, through what mixes or adds maps."""
    for _ in range(_STEPS):
        users = [u for u in live_users(way.node) if not _is_own_sum(u, way.node)]
        if len(users) != 1:
            return None
        user = users[0]
        product = product_of(user)
        if product is not None and not _mixes(user):
            return way, product
        step = _forward(way, user, axes, keys)
        if step is None:
            return None
        way = step
    return None


def _forward(way: Way, user: fx.Node, axes: Axes, keys: Atoms) -> Way | None:
    name = op_name(user).removesuffix("_")
    if _mixes(user) and user.args[0] is way.node:
        dims = _after_mixing(way.dims, user, axes, keys)
        return None if dims is None else Way(user, dims, "heads")
    moved = push(user, way.dims, axes) if user.args and user.args[0] is way.node else None
    if moved is not None:
        return Way(user, moved, way.mixed)
    if name in _ELEMENTWISE and shape_of(user) == shape_of(way.node):
        adds = name in ("add", "sub") and sum(map(is_tensor, user.args)) == 2
        return Way(user, way.dims, "sum" if adds else way.mixed)
    return None


def _is_own_sum(user: fx.Node, node: fx.Node) -> bool:
    """A sum of the map that it is divided by: ``a / a.sum(-1)``."""
    if not is_call(user, "sum") or user.args[0] is not node:
        return False
    while len(user.users) == 1 and not is_call(user, "div"):
        user = next(iter(user.users))
        if not is_call(user, "unsqueeze", "div", "div_", "expand", "clamp", "add"):
            return False
        if is_call(user, "div", "div_"):
            return user.args[0] is node
    return False


def _mixes(node: fx.Node) -> bool:
    """A linear map with weights of the model: on scores it mixes heads."""
    if is_call(node, "linear"):
        return is_parameter(node.args[1])  # type: ignore[arg-type]
    return is_call(node, "conv2d") and all(s == 1 for s in shape_of(node.args[1])[-2:])  # type: ignore[arg-type]


def _after_mixing(dims: Dims, node: fx.Node, axes: Axes, keys: Atoms) -> Dims | None:
    """The mixed dimension is a new axis; it must not be the keys."""
    place = len(dims) - 1 if is_call(node, "linear") else 1
    if set(axes.resolve(dims[place])) & set(axes.resolve(keys)):
        return None
    return tuple(axes.fresh(shape_of(node)[i]) if i == place else d for i, d in enumerate(dims))


# From the softmax back to the product that makes the scores


def from_product(way: Way, axes: Axes, keys: Atoms) -> tuple[Way, Product] | None:
    """Walk the scores back to a product of two activations."""
    node, dims, mixed = way.node, way.dims, way.mixed
    for _ in range(_STEPS):
        product = product_of(node)
        if product is not None and not _mixes(node):
            return Way(node, dims, mixed), product
        step = _backward(node, dims, axes, keys)
        if step is None:
            return None
        node, dims = step.node, step.dims
        mixed = step.mixed or mixed
    return None


def _backward(node: fx.Node, dims: Dims, axes: Axes, keys: Atoms) -> Way | None:
    if _mixes(node):
        source = node.args[0]
        assert isinstance(source, fx.Node)
        own = _after_mixing(dims, node, axes, keys)
        if own is None:
            return None
        place = len(dims) - 1 if is_call(node, "linear") else 1
        shape = shape_of(source)
        return Way(
            source,
            tuple(axes.fresh(shape[i]) if i == place else d for i, d in enumerate(dims)),
            "heads",
        )
    moved = pull(node, dims, axes)
    if moved is not None:
        atoms = pure(moved[1])
        return None if atoms is None else Way(moved[0], atoms)
    if op_name(node).removesuffix("_") not in _ELEMENTWISE:
        return None
    whole = [s for s in node.args if is_tensor(s) and _same_shape(s, node)]
    return Way(whole[0], dims) if whole else None  # type: ignore[arg-type]


def _same_shape(left: Any, right: fx.Node) -> bool:
    a, b = shape_of(left), shape_of(right)
    return len(a) == len(b) and all(
        same_size(as_size(x), as_size(y)) for x, y in zip(a, b, strict=True)
    )


# Around a product


def labelled(product: Product, dims: Dims, axes: Axes) -> dict[str, Atoms]:
    """Atoms of every label of a product whose output has the atoms ``dims``."""
    atoms = {x: d for x, d in zip(product.out_labels, dims, strict=True) if x}
    sizes = product.sizes()
    return atoms | {x: axes.fresh(sizes[x]) for x in product.contracted}


def operand_atoms(product: Product, left: bool, atoms: dict[str, Atoms]) -> tuple[fx.Node, Dims]:
    """One operand of a product and the atoms of its dimensions."""
    node, labels = (
        (product.left, product.left_labels) if left else (product.right, product.right_labels)
    )
    return node, tuple(atoms[x] if x else () for x in labels)


def touches(dims: Dims, wanted: Atoms, axes: Axes) -> bool:
    """True if any of the ``wanted`` atoms is among ``dims``."""
    return bool({a for d in dims for a in axes.resolve(d)} & set(axes.resolve(wanted)))


def value_side(
    way: Way, product: Product, axes: Axes, keys: Atoms
) -> tuple[tuple[fx.Node, Dims], Atoms, Dims] | None:
    """(V with its atoms, feature atoms, atoms of the output) of a product that contracts the
    keys."""
    on_left = product.left is way.node
    if product.left is product.right or not (on_left or product.right is way.node):
        return None
    own = product.left_labels if on_left else product.right_labels
    other = product.right_labels if on_left else product.left_labels
    atoms = {x: d for x, d in zip(own, way.dims, strict=True) if x}
    summed = {a for x in product.contracted for a in axes.resolve(atoms[x])}
    if summed != set(axes.resolve(keys)):
        return None
    sizes = product.sizes()
    new = [x for x in other if x and x not in atoms]
    atoms |= {x: axes.fresh(sizes[x]) for x in new}
    value = product.right if on_left else product.left
    if is_parameter(value):
        return None
    dims = tuple(atoms[x] if x else () for x in other)
    out = tuple(atoms[x] if x else () for x in product.out_labels)
    return (value, dims), tuple(a for x in new for a in atoms[x]), out
