"""Attention that is not one softmax between two products: recognised and named, with facts.

===========  ====================================================================================
``softmax``  scores or probabilities mixed between the products: talking heads (Shazeer et al. 2020,
             arXiv:2003.02436), a second map added (ConViT's gated positions, arXiv:2103.10697)
``linear``   softmax of K over the keys, then K^T V, then Q (Efficient attention, arXiv:1812.01243;
             CoaT, arXiv:2104.06399)
===========  ====================================================================================

Such a Site has a refusal that says why it is left as it is.  A ``linear`` Site is raised to the
cascade that it computes.  The cascade of a mixed one is the form of its family: what mixes or is
added is a further input, and scale, biases and masks are left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from attn_rewrite.cascade.ir import Cascade
from attn_rewrite.cascade.text import parse
from attn_rewrite.graph import (  # fmt: skip
    arguments,
    is_call,
    is_parameter,
    is_tensor,
    live_users,
    module_path,
    op_name,
    shape_of,
    source_line,
)
from attn_rewrite.passes.find.anchor import SDPA, refuse
from attn_rewrite.passes.find.axes import Atoms, Axes
from attn_rewrite.passes.find.facts import kind_of, layout_text, length_of
from attn_rewrite.passes.find.layout import pull, pure, push
from attn_rewrite.passes.find.product import Product, product_of
from attn_rewrite.passes.find.region import region
from attn_rewrite.passes.find.roles import Roles, operand, siblings
from attn_rewrite.site import Factor, Operand, Refusal, Site
from attn_rewrite.sizes import Size, as_size, same_size

_STEPS = 24
_ELEMENTWISE = frozenset(
    "add sub mul div to dropout neg where masked_fill clamp nan_to_num".split()
)
Dims = tuple[Atoms, ...]

_LINEAR = """cascade site
ranks b, h, q, kv, d, f
inputs Q[b, h, q, d], K[b, h, kv, d], V[b, h, kv, f]
tensor GM[b, h, d] default -inf
output AV

GM[b, h, d] = K[b, h, kv, d] :: reduce_kv max
SN[b, h, kv, d] = exp(K[b, h, kv, d] - GM[b, h, d])
SD[b, h, d] = SN[b, h, kv, d]
A[b, h, kv, d] = SN[b, h, kv, d] / SD[b, h, d]
KV[b, h, d, f] = A[b, h, kv, d] * V[b, h, kv, f]
AV[b, h, q, f] = Q[b, h, q, d] * KV[b, h, d, f]
"""


# Heads i have the softmax, heads g the values; where only one side mixes, the other map is one.
_TALKING = """cascade talking-heads
ranks b, h, i = {heads}, g = {heads}, q, kv, d, f
inputs Q[b, h, q, d], K[b, h, kv, d], V[b, g, kv, f]
output AV

QK[b, h, q, kv] = Q[b, h, q, d] * K[b, h, kv, d]
S[b, i, q, kv] = {score}
GM[b, i, q] = S[b, i, q, kv] :: reduce_kv max
SN[b, i, q, kv] = exp(S[b, i, q, kv] - GM[b, i, q])
SD[b, i, q] = SN[b, i, q, kv]
A[b, i, q, kv] = SN[b, i, q, kv] / SD[b, i, q]
AM[b, g, q, kv] = {probability}
AV[b, g, q, f] = AM[b, g, q, kv] * V[b, g, kv, f]
"""

# A second map, weighted like the probabilities by the model, joins them.
_SUMMED = """cascade probabilities-summed
ranks b, h, q, kv, d, f
inputs Q[b, h, q, d], K[b, h, kv, d], V[b, h, kv, f], MAP[b, h, q, kv], W[h]
output AV

QK[b, h, q, kv] = Q[b, h, q, d] * K[b, h, kv, d]
GM[b, h, q] = QK[b, h, q, kv] :: reduce_kv max
SN[b, h, q, kv] = exp(QK[b, h, q, kv] - GM[b, h, q])
SD[b, h, q] = SN[b, h, q, kv]
A[b, h, q, kv] = SN[b, h, q, kv] / SD[b, h, q]
AM[b, h, q, kv] = W[h] * A[b, h, q, kv] + MAP[b, h, q, kv]
AV[b, h, q, f] = AM[b, h, q, kv] * V[b, h, kv, f]
"""


@dataclass(frozen=True, eq=False)
class _Way:
    """A tensor on the way between softmax and product; ``mixed`` names what was done to it
    there."""

    node: fx.Node
    dims: Dims
    mixed: str = ""


def recognise(node: fx.Node, refusal: Refusal, module: fx.GraphModule, name: str) -> Site | None:
    """The Site around a softmax that `match` refused, if it is an attention after all."""
    if op_name(node) == SDPA or not is_tensor(node) or not shape_of(node):
        return None
    if refusal.code in (
        "no-score-product",
        "probabilities-summed",
        "not-a-value-product",
        "no-key-axis",
    ):
        found = _mixed(node, module, name)
        if found is not None:
            return found
    return _linear(node, module, name) if refusal.code == "no-score-product" else None


def _start(node: fx.Node, axes: Axes) -> tuple[_Way, Atoms]:
    shape = shape_of(node)
    place = int(arguments(node)["dim"]) % len(shape)
    dims = tuple(axes.line(s) if i == place else axes.fresh(s) for i, s in enumerate(shape))
    return _Way(node, dims), dims[place]


# From the softmax to the product that takes the probabilities


def _to_product(way: _Way, axes: Axes, keys: Atoms) -> tuple[_Way, Product] | None:
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


def _forward(way: _Way, user: fx.Node, axes: Axes, keys: Atoms) -> _Way | None:
    name = op_name(user).removesuffix("_")
    if _mixes(user) and user.args[0] is way.node:
        dims = _after_mixing(way.dims, user, axes, keys)
        return None if dims is None else _Way(user, dims, "heads")
    moved = push(user, way.dims, axes) if user.args and user.args[0] is way.node else None
    if moved is not None:
        return _Way(user, moved, way.mixed)
    if name in _ELEMENTWISE and shape_of(user) == shape_of(way.node):
        adds = name in ("add", "sub") and sum(map(is_tensor, user.args)) == 2
        return _Way(user, way.dims, "sum" if adds else way.mixed)
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


def _from_product(way: _Way, axes: Axes, keys: Atoms) -> tuple[_Way, Product] | None:
    """Walk the scores back to a product of two activations."""
    node, dims, mixed = way.node, way.dims, way.mixed
    for _ in range(_STEPS):
        product = product_of(node)
        if product is not None and not _mixes(node):
            return _Way(node, dims, mixed), product
        step = _backward(node, dims, axes, keys)
        if step is None:
            return None
        node, dims = step.node, step.dims
        mixed = step.mixed or mixed
    return None


def _backward(node: fx.Node, dims: Dims, axes: Axes, keys: Atoms) -> _Way | None:
    if _mixes(node):
        source = node.args[0]
        assert isinstance(source, fx.Node)
        own = _after_mixing(dims, node, axes, keys)
        if own is None:
            return None
        place = len(dims) - 1 if is_call(node, "linear") else 1
        shape = shape_of(source)
        return _Way(
            source,
            tuple(axes.fresh(shape[i]) if i == place else d for i, d in enumerate(dims)),
            "heads",
        )
    moved = pull(node, dims, axes)
    if moved is not None:
        atoms = pure(moved[1])
        return None if atoms is None else _Way(moved[0], atoms)
    if op_name(node).removesuffix("_") not in _ELEMENTWISE:
        return None
    whole = [s for s in node.args if is_tensor(s) and _same_shape(s, node)]
    return _Way(whole[0], dims) if whole else None  # type: ignore[arg-type]


def _same_shape(left: Any, right: fx.Node) -> bool:
    a, b = shape_of(left), shape_of(right)
    return len(a) == len(b) and all(
        same_size(as_size(x), as_size(y)) for x, y in zip(a, b, strict=True)
    )


# Softmax between mixed maps


def _mixed(node: fx.Node, module: fx.GraphModule, name: str) -> Site | None:
    axes = Axes()
    way, keys = _start(node, axes)
    scores = arguments(node)["self"]
    before = _from_product(_Way(scores, way.dims), axes, keys)
    after = _to_product(way, axes, keys)
    if before is None or after is None or not (before[0].mixed or after[0].mixed):
        return None
    atoms = _labelled(before[1], before[0].dims, axes)
    sides = [_operand_atoms(before[1], left, atoms) for left in (True, False)]
    has_keys = [_touches(dims, keys, axes) for _, dims in sides]
    if has_keys[0] == has_keys[1]:
        return None
    key, query = sides[has_keys.index(True)], sides[has_keys.index(False)]
    end = _value(after[0], after[1], axes, keys)
    if end is None:
        return None
    value, features, out_dims = end
    width = tuple(a for x in before[1].contracted for a in atoms[x])
    roles = _roles(query, key, value, keys, width, features, out_dims, axes)
    if roles is None:
        return None
    heads = axes.extent(roles.h)
    if not isinstance(heads, int):
        return None
    cascade, refusal = _family(node, before[0].mixed, after[0].mixed, heads)
    return _site(
        node,
        module,
        name,
        "softmax",
        (query, key, value),
        (after[1].node, out_dims),
        roles,
        axes,
        cascade,
        refusal,
    )


def _family(node: fx.Node, before: str, after: str, heads: Size) -> tuple[Cascade, Refusal]:
    """The form of the family, by what happens ahead of the softmax and behind it."""
    if after == "sum":
        reason = "the probabilities are added to another map before the value product"
        return parse(_SUMMED), refuse("probabilities-summed", reason, node)
    reason = "a linear map mixes the heads of the scores or of the probabilities (talking heads)"
    score = "WL[i, h] * QK[b, h, q, kv]" if before else "QK[b, i, q, kv]"
    probability = "WA[g, i] * A[b, i, q, kv]" if after else "A[b, g, q, kv]"
    text = _TALKING.format(heads=heads, score=score, probability=probability)
    return parse(text), refuse("talking-heads", reason, node)


def _labelled(product: Product, dims: Dims, axes: Axes) -> dict[str, Atoms]:
    atoms = {x: d for x, d in zip(product.out_labels, dims, strict=True) if x}
    sizes = product.sizes()
    return atoms | {x: axes.fresh(sizes[x]) for x in product.contracted}


def _operand_atoms(product: Product, left: bool, atoms: dict[str, Atoms]) -> tuple[fx.Node, Dims]:
    node, labels = (
        (product.left, product.left_labels) if left else (product.right, product.right_labels)
    )
    return node, tuple(atoms[x] if x else () for x in labels)


def _touches(dims: Dims, wanted: Atoms, axes: Axes) -> bool:
    return bool({a for d in dims for a in axes.resolve(d)} & set(axes.resolve(wanted)))


def _value(
    way: _Way, product: Product, axes: Axes, keys: Atoms
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


def _roles(
    query: tuple[fx.Node, Dims],
    key: tuple[fx.Node, Dims],
    value: tuple[fx.Node, Dims],
    keys: Atoms,
    width: Atoms,
    features: Atoms,
    out_dims: Dims,
    axes: Axes,
) -> Roles | None:
    """Roles by place: mixing makes new head axes, so every axis of an operand that is shared and
    sits with the width in a projection is a head."""
    related = (
        siblings(*query, width, axes)
        | siblings(*key, width, axes)
        | siblings(*value, features, axes)
    )

    def atoms(dims: Dims) -> Atoms:
        return tuple(a for d in dims for a in axes.resolve(d))

    everything = tuple(
        dict.fromkeys((*atoms(query[1]), *atoms(key[1]), *atoms(value[1]), *atoms(out_dims)))
    )
    keys, width, features = (axes.resolve(x) for x in (keys, width, features))
    rest = [a for a in everything if a not in {*keys, *width, *features}]
    in_query, in_key = set(atoms(query[1])), set(atoms(key[1]))
    alone = [a for a in rest if a in in_query and a not in in_key and a not in related]
    heads = tuple(a for a in rest if a in related or (a not in in_query and a not in alone))
    q = tuple(alone)
    batch = tuple(a for a in rest if a not in heads and a not in q)
    if not heads and len(batch) > 1:
        batch, heads = batch[:1], batch[1:]
    return Roles(batch, heads, (), q, keys, width, features) if q or batch else None


# Softmax of the keys, then K^T V


def _linear(node: fx.Node, module: fx.GraphModule, name: str) -> Site | None:
    axes = Axes()
    way, keys = _start(node, axes)
    after = _to_product(way, axes, keys)
    if after is None or after[0].mixed:
        return None
    end = _value(*after, axes, keys)
    if end is None:
        return None
    value, features, middle = end
    shared = {a for d in value[1] for a in axes.resolve(d)}
    width = tuple(a for d in after[0].dims for a in axes.resolve(d) if a not in shared)
    second = _to_product(_Way(after[1].node, middle), axes, keys)
    if not width or not features or second is None or second[0].mixed:
        return None
    found = _query(second[0], second[1], axes, width)
    if found is None:
        return None
    query, rows, out_dims = found
    scores = arguments(node)["self"]
    batch = tuple(
        a
        for a in dict.fromkeys(a for d in way.dims for a in axes.resolve(d))
        if a in shared and a not in axes.resolve(keys)
    )
    heads = set(axes.resolve(tuple(siblings(scores, way.dims, width, axes))))
    own = Roles(
        tuple(a for a in axes.resolve(batch) if a not in heads),
        tuple(a for a in axes.resolve(batch) if a in heads),
        (), axes.resolve(rows), axes.resolve(keys), axes.resolve(width), axes.resolve(features),
    )  # fmt: skip
    if not own.h and len(own.b) > 1:
        own = Roles(own.b[:1], own.b[1:], (), own.q, own.kv, own.d, own.f)
    reason = (
        "the softmax is taken of the keys before K^T V; this family is recognised, not rewritten"
    )
    refusal = refuse("linear-attention", reason, node)
    return _site(
        node,
        module,
        name,
        "linear",
        (query, (scores, way.dims), value),
        (second[1].node, out_dims),
        own,
        axes,
        parse(_LINEAR),
        refusal,
    )


def _query(
    way: _Way, product: Product, axes: Axes, width: Atoms
) -> tuple[tuple[fx.Node, Dims], Atoms, Dims] | None:
    """(Q with its atoms, its rows, atoms of the output) of a product that contracts the width."""
    found = _value(way, product, axes, width)
    if found is None or not found[1]:
        return None
    query, rows, out = found
    return query, rows, out


# The Site


def _site(
    node: fx.Node,
    module: fx.GraphModule,
    name: str,
    family: str,
    tensors: tuple[tuple[fx.Node, Dims], tuple[fx.Node, Dims], tuple[fx.Node, Dims]],
    output: tuple[fx.Node, Dims],
    roles: Roles,
    axes: Axes,
    cascade: Cascade,
    refusal: Refusal,
) -> Site | None:
    everything = [*tensors, output]
    if not all(roles.knows(axes.resolve(d)) for _, dims in everything for d in dims):
        return None
    heads = axes.extent(roles.h)
    if not isinstance(heads, int):
        return None
    inputs = {n: operand(*t, roles, axes) for n, t in zip("QKV", tensors, strict=True)}
    result: Operand = operand(*output, roles, axes)
    kind, rope = kind_of(inputs["Q"], inputs["K"], roles)
    return Site(
        name=name,
        module=module_path(node),
        kind=kind,
        family=family,
        causal=False,
        hq=heads,
        hkv=heads,
        q_len=length_of(inputs["Q"], "q", axes.extent(roles.q)),
        kv_len=length_of(inputs["K"], "kv", axes.extent(roles.kv)),
        d_qk=axes.extent(roles.d),
        d_v=axes.extent(roles.f),
        scale=1.0,
        dropout=0.0,
        rope=rope,
        layout=layout_text(inputs["Q"]),
        cascade=cascade,
        graph=module,
        anchor=node,
        nodes=region(result.node, [o.node for o in inputs.values()]),
        inputs=inputs,
        output=result,
        factors=tuple(
            Factor(r, a, axes.size(a))
            for r in ("b", "h", "q", "kv", "d", "f")
            for a in getattr(roles, r)
        ),
        source=source_line(node),
        refusals=(refusal,),
    )
