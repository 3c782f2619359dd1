"""Softmax attention whose maps are mixed over heads, or added to another map, before V.

Talking heads (Shazeer et al. 2020, arXiv:2003.02436), gated positions (ConViT, arXiv:2103.10697),
differential attention (arXiv:2410.05258), and what else is linear in softmaxes over the keys.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from attn_rewrite.cascade.expr import Call, Const, Expr, Read, conjuncts, walk
from attn_rewrite.cascade.ir import Cascade
from attn_rewrite.cascade.simplify import is_causal_term
from attn_rewrite.graph import module_path, source_line
from attn_rewrite.passes.find.anchor import refuse
from attn_rewrite.passes.find.assemble import Assembled, Assembler
from attn_rewrite.passes.find.axes import Atoms
from attn_rewrite.passes.find.facts import kind_of, layout_text, length_of
from attn_rewrite.passes.find.places import Sources, places_of
from attn_rewrite.passes.find.product import contraction, of_weights
from attn_rewrite.passes.find.ranks import UnplacedError
from attn_rewrite.passes.find.reach import reach
from attn_rewrite.passes.find.region import region
from attn_rewrite.passes.find.roles import Roles
from attn_rewrite.passes.find.stages import Stage, StageLifter, stages_of
from attn_rewrite.site import Operand, Refusal, Site

_LINEAR = frozenset({"add", "sub", "mul", "div", "neg", "where", "clip", "reciprocal"})
_TRIES = 4


def mixed(node: fx.Node, module: fx.GraphModule, name: str) -> Site | None:
    """The Site of a softmax between mixed maps; None if it is not one."""
    through: frozenset[fx.Node] = frozenset()
    for _ in range(_TRIES):
        way = reach(node, through)
        if way is None or of_weights(way.value):
            return None
        lifter, root = stages_of(node, module, way)
        if root is not None and any(s.node is node for s in lifter.stages.values()):
            return _site(lifter, root, module, name)
        through |= {way.product.node}  # it sums over another axis: weights made by the model
    return None


def _site(lifter: StageLifter, root: Stage, module: fx.GraphModule, name: str) -> Site | None:
    refusal = _family(lifter, root)
    sources = _sources(lifter, root)
    if refusal is None or sources is None or len(set(lifter.dropouts)) > 1:
        return None
    names: dict[str, str] = {}
    for at, (query, key) in enumerate(sources.pairs):
        suffix = str(at + 1) if at else ""
        names |= {query.name: f"Q{suffix}", key.name: f"K{suffix}"}
    names[sources.value.name] = "V"
    weights = frozenset(
        x
        for s in lifter.stages.values()
        if s.kind == "product" and s is not root
        for x in lifter.operands[s.name]
    )
    try:
        places = places_of(lifter, root, sources)
        assembler = Assembler(lifter, places, root, names, weights)
        made = assembler.assemble("site")
    except UnplacedError:
        return None
    return site_of(lifter, root, made, module, name, "softmax", refusal)


def _sources(lifter: StageLifter, root: Stage) -> Sources | None:
    """Q and K of every score, and V; None unless every softmax has scores."""
    leaves, axes = lifter.leaves, lifter.axes
    keys = set(axes.resolve(lifter.region.keys))
    scores = [s for s in lifter.stages.values() if s.kind == "score"]
    pairs = []
    for stage in scores:
        sides = [leaves[n] for n in lifter.operands[stage.name]]
        if len(sides) != 2:
            return None
        on_left = bool(keys & {a for d in sides[0].dims for a in axes.resolve(d)})
        pairs.append((sides[1], sides[0]) if on_left else (sides[0], sides[1]))
    values = lifter.operands[root.name]
    softmaxes = [s for s in lifter.stages.values() if s.kind == "softmax"]
    if not pairs or len(values) != 1 or not all(_has_score(lifter, s) for s in softmaxes):
        return None
    value = leaves[values[0]]
    return Sources(tuple(pairs), value, tuple(s.folded for s in scores), _features(lifter, root))


def _features(lifter: StageLifter, root: Stage) -> Atoms:
    """Axes of the output that V has and the map has not."""
    found = contraction(root.node)
    assert found is not None
    product = found.product
    left = product.left in lifter.region.ahead
    mapped = product.left_labels if left else product.right_labels
    return tuple(
        a
        for x, d in zip(product.out_labels, root.dims, strict=True)
        if x and x not in mapped
        for a in d
    )


def _has_score(lifter: StageLifter, stage: Stage) -> bool:
    found = [lifter.stages[r.tensor] for r in lifter.stage_reads(stage.body)]
    return any(s.kind == "score" or (s.kind != "softmax" and _has_score(lifter, s)) for s in found)


# What is done to the maps


def _family(lifter: StageLifter, root: Stage) -> Refusal | None:
    """The reason why the Site is left as it is; None where nothing is mixed or summed."""
    anchor = lifter.region.anchor
    behind = [s for s in lifter.stages.values() if _behind_softmax(lifter, s)]
    if not all(is_linear(lifter, s.body) for s in behind):
        return None
    left = "no kernel here does that with less work, so it is left as it is"
    if any(s.kind == "product" and s is not root for s in lifter.stages.values()):
        reason = (
            f"a linear map mixes the heads of the scores or probabilities (talking heads); {left}"
        )
        return refuse("talking-heads", reason, anchor)
    if any(_adds_maps(lifter, s.body) for s in behind):
        reason = f"the probabilities are added to another map before the value product; {left}"
        return refuse("probabilities-summed", reason, anchor)
    return None


def _behind_softmax(lifter: StageLifter, stage: Stage) -> bool:
    """True if the stage is made of probabilities and is none itself."""
    return stage.kind not in ("softmax", "score") and any(
        s.kind == "softmax" or _behind_softmax(lifter, s)
        for s in (lifter.stages[r.tensor] for r in lifter.stage_reads(stage.body))
    )


def _is_map(lifter: StageLifter, expr: Expr) -> bool:
    """True if a map over the keys is read in it."""
    keys = set(lifter.axes.resolve(lifter.region.keys))
    return any(
        keys & set(lifter.axes.resolve(lifter.stages[r.tensor].atoms))
        for r in lifter.stage_reads(expr)
    )


def is_linear(lifter: StageLifter, expr: Expr) -> bool:
    """True if maps are scaled, added and masked, and nothing else."""
    if not lifter.stage_reads(expr) or isinstance(expr, Read):
        return True
    if not isinstance(expr, Call) or expr.op not in _LINEAR:
        return False
    if expr.op == "reciprocal":
        return not _is_map(lifter, expr.args[0])
    if expr.op == "mul" and sum(_is_map(lifter, a) for a in expr.args) > 1:
        return False
    if expr.op == "div" and _is_map(lifter, expr.args[1]):
        return False
    if expr.op == "where" and lifter.stage_reads(expr.args[0]):
        return False
    return all(is_linear(lifter, a) for a in expr.args)


def _adds_maps(lifter: StageLifter, expr: Expr) -> bool:
    """True if a map is added to another tensor."""
    return any(
        isinstance(n, Call)
        and n.op in ("add", "sub")
        and any(_is_map(lifter, a) for a in n.args)
        and all(any(isinstance(r, Read) for r in walk(a)) for a in n.args)
        for n in walk(expr)
    )


# The Site


def site_of(
    lifter: StageLifter,
    root: Stage,
    made: Assembled,
    module: fx.GraphModule,
    name: str,
    family: str,
    refusal: Refusal,
) -> Site | None:
    """The Site of an assembled cascade; None where the number of heads is not static."""
    axes, inputs, anchor = lifter.axes, made.inputs, lifter.region.anchor

    def extent(*roles: str) -> Any:
        return axes.extent(tuple(f.axis for f in made.factors if f.role in roles))

    heads, shared = extent("h", "g"), extent("h")
    if not isinstance(heads, int) or not isinstance(shared, int):
        return None
    batch = Roles(tuple(f.axis for f in made.factors if f.role == "b"), *((),) * 6)
    kind, rope = kind_of(inputs["Q"], inputs["K"], batch)
    output = Operand(root.node, made.output)
    return Site(
        name=name,
        module=module_path(anchor),
        kind=kind,
        family=family,
        causal=family == "softmax" and _is_causal(lifter, made.cascade),
        hq=heads,
        hkv=shared,
        q_len=length_of(inputs["Q"], "q", extent("q")),
        kv_len=length_of(inputs["K"], "kv", extent("kv")),
        d_qk=extent("d"),
        d_v=extent("f"),
        scale=_scale(made.cascade),
        dropout=next(iter(lifter.dropouts), 0.0),
        rope=rope,
        layout=layout_text(inputs["Q"]),
        cascade=made.cascade,
        graph=module,
        anchor=anchor,
        nodes=region([root.node], [o.node for o in inputs.values()]),
        inputs=inputs,
        output=output,
        factors=made.factors,
        source=source_line(anchor),
        refusals=(refusal,),
    )


def _is_causal(lifter: StageLifter, cascade: Cascade) -> bool:
    """True if every softmax keeps only keys at or before the query, and no other map is added."""
    tops = [e for e in cascade.einsums() if dict(e.reduce).get("kv") == "max"]
    if not all(any(is_causal_term(t) is not None for t in conjuncts(e.guard)) for e in tops):
        return False
    keys = set(lifter.axes.resolve(lifter.region.keys))
    added = {
        r.tensor
        for s in lifter.stages.values()
        if _behind_softmax(lifter, s)
        for n in walk(s.body)
        if isinstance(n, Call) and n.op in ("add", "sub")
        for r in walk(n)
        if isinstance(r, Read) and r.tensor in lifter.leaves
    }
    atoms = (a for n in added for d in lifter.leaves[n].dims for a in lifter.axes.resolve(d))
    return not keys & set(atoms)


def _scale(cascade: Cascade) -> float:
    """The constant factor on the first product of Q and K; 1.0 where there is none."""
    for e in cascade.einsums():
        for n in walk(e.expr):
            if isinstance(n, Call) and n.op == "mul" and isinstance(n.args[1], Const):
                inner = n.args[0]
                if isinstance(inner, Read) and inner.tensor == "QK":
                    return float(n.args[1].value)
    return 1.0
