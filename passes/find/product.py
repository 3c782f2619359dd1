"""Contractions in one normal form: two operands, and a label for every dimension.

matmul, bmm, mm, mv, einsum of two operands, and an activation-by-activation linear all become
labelled products; a label on both operands and not on the output is contracted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from attn_rewrite.graph import arguments, is_call, is_parameter, is_tensor, op_name, shape_of
from attn_rewrite.sizes import as_size, same_size

Labels = tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Product:
    """``node[out] = sum of left[left_labels] * right[right_labels]`` over labels not in ``out``.

    A dimension of length 1 that broadcasts has the label ``""``.
    """

    node: fx.Node
    left: fx.Node
    right: fx.Node
    left_labels: Labels
    right_labels: Labels
    out_labels: Labels

    @property
    def contracted(self) -> Labels:
        """Labels summed over."""
        return tuple(
            x for x in self.left_labels if x and x in self.right_labels and x not in self.out_labels
        )

    def sizes(self) -> dict[str, Any]:
        """Extent of every label."""
        out: dict[str, Any] = {}
        for operand, labels in ((self.left, self.left_labels), (self.right, self.right_labels)):
            for label, size in zip(labels, shape_of(operand), strict=True):
                if label:
                    out[label] = as_size(size)
        return out


def product_of(node: fx.Node) -> Product | None:
    """The product a node computes, or None."""
    match op_name(node):
        case "matmul" | "bmm" | "mm" | "mv" | "dot":
            return _matmul(node)
        case "einsum":
            return _einsum(node)
        case "linear":
            return _linear(node)
        case "inner" | "tensordot":
            return _tensordot(node)
    return None


@dataclass(frozen=True, eq=False)
class Contraction:
    """A product, or a linear map with weights of the model; ``bias`` is added along label ``n``."""

    product: Product
    bias: fx.Node | None = None


def contraction(node: fx.Node) -> Contraction | None:
    """The product a node computes, linear maps and 1x1 convolutions included; None for others."""
    product = product_of(node)
    if product is not None:
        return Contraction(product)
    if is_call(node, "linear"):
        return _weighted(node, arguments(node)["input"], -1)
    if is_call(node, "conv2d") and _is_pointwise(node):
        return _weighted(node, arguments(node)["input"], 1)
    return None


def _weighted(node: fx.Node, source: fx.Node, place: int) -> Contraction | None:
    """``node`` as a product with its weight [n, k, ...] over the dimension ``place``."""
    named = arguments(node)
    weight, rank = named["weight"], len(shape_of(source))
    if not is_tensor(weight) or rank != len(shape_of(node)):
        return None
    rows = [f"x{i}" for i in range(rank)]
    labels = tuple(rows[:place] + ["k"] + (rows[place + 1 :] if place >= 0 else []))
    out = tuple("n" if x == "k" else x for x in labels)
    side = ("n", "k", *("",) * (len(shape_of(weight)) - 2))
    return Contraction(Product(node, source, weight, labels, side, out), named["bias"])


def _is_pointwise(node: fx.Node) -> bool:
    """A convolution that only maps channels: a 1x1 kernel, no stride, no groups, no padding."""
    named = arguments(node)
    ones = all(same_size(as_size(s), 1) for s in shape_of(named["weight"])[2:])
    steps = [named[n] for n in ("stride", "dilation")]
    unmoved = all(x == 1 for s in steps for x in (s if isinstance(s, (list, tuple)) else [s]))
    padding = named["padding"]
    inside = padding in ("valid", "same") or all(p == 0 for p in padding)
    return ones and unmoved and inside and named["groups"] == 1 and len(shape_of(node)) == 4


def of_weights(node: Any) -> bool:
    """True if a tensor is made of parameters and buffers of the model alone."""
    queue, seen = [node], 0
    while queue:
        here = queue.pop()
        if not isinstance(here, fx.Node) or not is_tensor(here):
            return False
        if is_parameter(here):
            continue
        seen += 1
        if here.op != "call_function" or not here.all_input_nodes or seen > 16:
            return False
        queue += here.all_input_nodes
    return True


def outer_product(node: fx.Node) -> Product | None:
    """``a * b`` where each side has an axis that the other broadcasts: a product of width 1."""
    pair = _operands(node) if op_name(node) in ("mul", "mul_", "outer") else None
    if pair is None or any(_is_fixed(x) for x in pair):
        return None
    rank = len(shape_of(node))
    names = [f"x{i}" for i in range(rank)]
    if op_name(node) == "outer":
        return Product(node, *pair, ("x0",), ("x1",), ("x0", "x1"))
    left, right = (_batch(shape_of(x), names) for x in pair)
    if not set(left) - set(right) - {""} or not set(right) - set(left) - {""}:
        return None
    out = tuple(n if n in left or n in right else "" for n in names)
    return Product(node, *pair, left, right, out)


def _is_fixed(node: fx.Node) -> bool:
    """Whole numbers and truth values, and what no activation goes into: no query and no key."""
    made = bool(node.all_input_nodes) or node.op == "placeholder"
    return not (made and node.meta["val"].dtype.is_floating_point)


def _operands(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    left, right = node.args[0], node.args[1]
    return (left, right) if is_tensor(left) and is_tensor(right) else None  # type: ignore[return-value]


def _matmul(node: fx.Node) -> Product | None:
    pair = _operands(node)
    if pair is None:
        return None
    left, right = shape_of(pair[0]), shape_of(pair[1])
    batch = max(len(left), len(right)) - 2
    names = [f"x{i}" for i in range(max(batch, 0))]
    l_labels = _batch(left[:-2], names) + (("m", "k") if len(left) > 1 else ("k",))
    r_labels = _batch(right[:-2], names) + (("k", "n") if len(right) > 1 else ("k",))
    out = tuple(
        n if n in l_labels or n in r_labels else "" for n in names
    ) + tuple(x for x, shape in (("m", left), ("n", right)) if len(shape) > 1)  # fmt: skip
    return Product(node, *pair, l_labels, r_labels, out)


def _batch(shape: tuple[Any, ...], names: list[str]) -> Labels:
    own = names[len(names) - len(shape) :] if shape else []
    return tuple("" if same_size(as_size(s), 1) else n for s, n in zip(shape, own, strict=True))


def _einsum(node: fx.Node) -> Product | None:
    named = arguments(node)
    tensors = named["tensors"]
    if len(tensors) != 2 or not all(map(is_tensor, tensors)):
        return None
    left, right = tensors
    equation = named["equation"].replace(" ", "")
    inputs, arrow, out = equation.partition("->")
    a, b = inputs.split(",")
    if not arrow:
        letters = (a + b).replace(".", "")
        out = ("..." if "." in inputs else "") + "".join(
            c for c in sorted(set(letters)) if letters.count(c) == 1
        )
    dots = (
        max(
            len(shape_of(t)) - len(s.replace(".", ""))
            for t, s in ((left, a), (right, b))
            if "..." in s
        )
        if "." in inputs
        else 0
    )
    labels = [_letters(s, shape_of(t), dots) for s, t in ((a, left), (b, right))]
    if any(len(set(x) - {""}) != len([c for c in x if c]) for x in labels):
        return None  # a repeated letter is a diagonal
    known = set(labels[0]) | set(labels[1])
    target = tuple(x if x in known else "" for x in _expand_letters(out, dots))
    summed = (set(labels[0]) ^ set(labels[1])) - set(target) - {""}
    return None if summed else Product(node, left, right, labels[0], labels[1], target)


def _expand_letters(spec: str, dots: int) -> Labels:
    head, ellipsis, tail = spec.partition("...")
    middle = tuple(f"x{i}" for i in range(dots)) if ellipsis else ()
    return (*head, *middle, *tail)


def _letters(spec: str, shape: tuple[Any, ...], dots: int) -> Labels:
    own = len(shape) - len(spec.replace(".", ""))
    labels = _expand_letters(spec, own)
    shifted = tuple(
        f"x{int(x[1:]) + dots - own}" if x[0] == "x" and len(x) > 1 else x for x in labels
    )
    return tuple("" if same_size(as_size(s), 1) else x for x, s in zip(shifted, shape, strict=True))


def _tensordot(node: fx.Node) -> Product | None:
    """``tensordot`` over one axis of each side; ``inner`` over the last of both."""
    named = arguments(node)
    left, right = named["self"], named["other"]
    if not (is_tensor(left) and is_tensor(right)):
        return None
    ranks = len(shape_of(left)), len(shape_of(right))
    over = [named.get("dims_self", [-1]), named.get("dims_other", [-1])]
    if any(len(dims) != 1 for dims in over) or 0 in ranks:
        return None
    sides = [
        tuple("k" if i == dims[0] % rank else f"{name}{i}" for i in range(rank))
        for name, rank, dims in zip("lr", ranks, over, strict=True)
    ]
    out = tuple(x for side in sides for x in side if x != "k")
    return Product(node, left, right, sides[0], sides[1], out)


def _linear(node: fx.Node) -> Product | None:
    """``F.linear(q, k)`` with an activation as the weight is a product; with a parameter it is
    not."""
    named = arguments(node)
    weight = named["weight"]
    if named["bias"] is not None or not is_tensor(weight) or is_parameter(weight):
        return None
    source = weight
    while is_call(source, "t", "transpose", "to", "view", "detach"):
        source = source.args[0]
    if is_parameter(source) or not is_tensor(named["input"]):
        return None
    left, right = named["input"], weight
    names = tuple(f"x{i}" for i in range(len(shape_of(left)) - 2))
    rows = ("m",) if len(shape_of(left)) > 1 else ()
    columns = ("n",) if len(shape_of(right)) > 1 else ()
    return Product(
        node, left, right, (*names, *rows, "k"), (*columns, "k"), (*names, *rows, *columns)
    )
