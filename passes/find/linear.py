"""Softmax of the keys over their positions, then K^T V, then Q: attention without scores."""

from __future__ import annotations

from torch import fx

from attn_rewrite.cascade.expr import Read, walk
from attn_rewrite.passes.find.anchor import refuse
from attn_rewrite.passes.find.assemble import Assembler
from attn_rewrite.passes.find.lift import Leaf
from attn_rewrite.passes.find.mixed import is_linear, site_of
from attn_rewrite.passes.find.product import of_weights
from attn_rewrite.passes.find.ranks import Places, UnplacedError
from attn_rewrite.passes.find.reach import reach
from attn_rewrite.passes.find.roles import siblings
from attn_rewrite.passes.find.stages import Stage, StageLifter, stages_of
from attn_rewrite.site import Site


def linear(node: fx.Node, module: fx.GraphModule, name: str) -> Site | None:
    """The Site of a softmax over the positions of K; None if K^T V and Q do not follow."""
    first = reach(node)
    if first is None or of_weights(first.value):
        return None
    second = reach(first.product.node)
    if second is None or of_weights(second.value):
        return None
    lifter, root = stages_of(node, module, first, second)
    if root is None or lifter.dropouts:
        return None
    context = next((s for s in lifter.stages.values() if s.node is first.product.node), None)
    softmax = next((s for s in lifter.stages.values() if s.node is node), None)
    if context is None or softmax is None:
        return None
    return _site(lifter, root, context, softmax, module, name)


def _site(
    lifter: StageLifter,
    root: Stage,
    context: Stage,
    softmax: Stage,
    module: fx.GraphModule,
    name: str,
) -> Site | None:
    queries, values = ([lifter.leaves[n] for n in lifter.operands[s.name]] for s in (root, context))
    keys = list(dict.fromkeys(r.tensor for r in walk(softmax.body) if isinstance(r, Read)))
    others = (s for s in lifter.stages.values() if s not in (root, context, softmax))
    if len(queries) != 1 or len(values) != 1 or not keys or any(s.kind != "map" for s in others):
        return None
    if not all(is_linear(lifter, s.body) for s in lifter.stages.values() if s is not softmax):
        return None
    (query,), (value,), key = queries, values, lifter.leaves[keys[0]]
    places = _places(lifter, root, (query, key, value))
    if places is None:
        return None
    names = {query.name: "Q", key.name: "K", value.name: "V"}
    try:
        made = Assembler(lifter, places, root, names).assemble("site")
    except UnplacedError:
        return None
    reason = (
        "the softmax is taken of the keys before K^T V: no scores are made, and no kernel here "
        "does that with less work, so it is left as it is"
    )
    refusal = refuse("linear-attention", reason, lifter.region.anchor)
    return site_of(lifter, root, made, module, name, "linear", refusal)


def _places(lifter: StageLifter, root: Stage, leaves: tuple[Leaf, Leaf, Leaf]) -> Places | None:
    """Roles: the width joins K^T V and Q, rows are Q's alone, features V's alone."""
    axes = lifter.axes
    query, key, _ = leaves
    width = axes.resolve(root.folded)
    related = siblings(query.node, query.dims, width, axes)
    related |= siblings(key.node, key.dims, width, axes)
    own = [set(axes.resolve([a for d in leaf.dims for a in d])) for leaf in leaves]
    out, kv = axes.resolve(root.atoms), axes.resolve(lifter.region.keys)
    width, related = axes.resolve(width), set(axes.resolve(tuple(related)))
    features = tuple(a for a in out if a in own[2] and a not in own[0] | own[1])
    rows = tuple(a for a in out if a in own[0] and a not in own[1] | own[2])
    if not width or not features or not rows or not set(width) <= own[0]:
        return None
    shared = tuple(a for a in out if a not in {*features, *rows})
    heads = tuple(a for a in shared if a in related)
    batch = tuple(a for a in shared if a not in related)
    if not heads and len(batch) > 1:
        batch, heads = batch[:1], batch[1:]
    return Places(batch, heads, rows, kv, features, (), (width,))
