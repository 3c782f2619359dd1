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

from torch import fx

from attn_rewrite.cascade.ir import Cascade
from attn_rewrite.cascade.text import parse
from attn_rewrite.graph import (  # fmt: skip
    arguments,
    is_tensor,
    module_path,
    op_name,
    shape_of,
    source_line,
)
from attn_rewrite.passes.find.anchor import FUSED, refuse
from attn_rewrite.passes.find.axes import Atoms, Axes
from attn_rewrite.passes.find.facts import kind_of, layout_text, length_of
from attn_rewrite.passes.find.product import Product
from attn_rewrite.passes.find.region import region
from attn_rewrite.passes.find.roles import Roles, operand, siblings
from attn_rewrite.passes.find.walks import (  # fmt: skip
    Dims,
    Way,
    from_product,
    labelled,
    operand_atoms,
    start,
    to_product,
    touches,
    value_side,
)
from attn_rewrite.site import Factor, Operand, Refusal, Site
from attn_rewrite.sizes import Size

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


def recognise(node: fx.Node, refusal: Refusal, module: fx.GraphModule, name: str) -> Site | None:
    """The Site around a softmax that `match` refused, if it is an attention after all."""
    if op_name(node) in FUSED or not is_tensor(node) or not shape_of(node):
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


# Softmax between mixed maps


def _mixed(node: fx.Node, module: fx.GraphModule, name: str) -> Site | None:
    axes = Axes()
    way, keys = start(node, axes)
    scores = arguments(node)["self"]
    before = from_product(Way(scores, way.dims), axes, keys)
    after = to_product(way, axes, keys)
    if before is None or after is None or not (before[0].mixed or after[0].mixed):
        return None
    atoms = labelled(before[1], before[0].dims, axes)
    sides = [operand_atoms(before[1], left, atoms) for left in (True, False)]
    has_keys = [touches(dims, keys, axes) for _, dims in sides]
    if has_keys[0] == has_keys[1]:
        return None
    key, query = sides[has_keys.index(True)], sides[has_keys.index(False)]
    end = value_side(after[0], after[1], axes, keys)
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
    way, keys = start(node, axes)
    after = to_product(way, axes, keys)
    if after is None or after[0].mixed:
        return None
    end = value_side(*after, axes, keys)
    if end is None:
        return None
    value, features, middle = end
    shared = {a for d in value[1] for a in axes.resolve(d)}
    width = tuple(a for d in after[0].dims for a in axes.resolve(d) if a not in shared)
    second = to_product(Way(after[1].node, middle), axes, keys)
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
    way: Way, product: Product, axes: Axes, width: Atoms
) -> tuple[tuple[fx.Node, Dims], Atoms, Dims] | None:
    """(Q with its atoms, its rows, atoms of the output) of a product that contracts the width."""
    found = value_side(way, product, axes, width)
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
