"""From an anchor to a Site: choose the score product, give axes roles, raise to a cascade."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import fx

from attn_rewrite.cascade.attention import QK, SoftmaxAttention, softmax_cascade
from attn_rewrite.cascade.expr import (
    TRUE,
    Call,
    Const,
    Expr,
    Extent,
    Rank,
    Read,
    call,
    conjunction,
    conjuncts,
    substitute,
    walk,
)
from attn_rewrite.cascade.ir import TensorDecl
from attn_rewrite.cascade.simplify import is_boolean, simplify
from attn_rewrite.graph import (
    PARAMETER,
    ROLE_ORDER,
    canonical_groups,
    module_path,
    source_line,
    value_of,
)
from attn_rewrite.passes.find.anchor import Anchor, open_anchor, refuse
from attn_rewrite.passes.find.axes import Atoms
from attn_rewrite.passes.find.constants import attribute
from attn_rewrite.passes.find.facts import (
    kind_of,
    layout_text,
    length_of,
)
from attn_rewrite.passes.find.forward import Forward, follow
from attn_rewrite.passes.find.guards import causal_offset, positions, split_guard
from attn_rewrite.passes.find.lift import Dot
from attn_rewrite.passes.find.masks import normal
from attn_rewrite.passes.find.operands import trim
from attn_rewrite.passes.find.region import region
from attn_rewrite.passes.find.roles import Roles, assign, from_features, groups, in_ranks, operand
from attn_rewrite.site import Operand, Refusal, Site

Tensor = tuple[fx.Node, tuple[Atoms, ...]]
# The cascade's name for the positions of the queries, where they are a tensor.
POSITION = "POS"


@dataclass(frozen=True, eq=False)
class Raised:
    """The mathematics of a site: score, guard, factor, and the tensors they read."""

    score: Expr
    guard: Expr
    weight: Expr | None
    sink: Expr | None
    reads: dict[str, Operand]


def match(node: fx.Node, module: fx.GraphModule, name: str) -> Site | Refusal:
    """Recognise the attention around an anchor node, or say why it is not one."""
    anchor = open_anchor(node, module)
    if isinstance(anchor, Refusal):
        return anchor
    dot = _score_product(anchor)
    if isinstance(dot, Refusal):
        return dot
    forward = follow(anchor)
    if isinstance(forward, Refusal):
        return forward
    return _site(anchor, dot, forward, module, name)


def _score_product(anchor: Anchor) -> Dot | Refusal:
    """The product whose output covers every key axis, keys on one side only."""
    axes, keys = anchor.axes, set(anchor.axes.resolve(anchor.keys))
    used = {n.tensor for n in walk(anchor.score) if isinstance(n, Read)}
    dots = [d for d in anchor.lifter.dots.values() if d.name in used]
    if not dots:
        reason = "the argument of the softmax is not computed from a product of two tensors"
        return refuse("no-score-product", reason, anchor.node)
    plain = _outside_conditions(anchor.score)
    for dot in sorted(dots, key=lambda d: d.name not in plain):  # a mask may be of a product too
        if not keys <= {a for d in dot.dims for a in axes.resolve(d)}:
            continue
        sides = [
            {a for d in dot.operand(left)[1] for a in axes.resolve(d)} for left in (True, False)
        ]
        on = [bool(keys & side) for side in sides]
        if on != [True, True] and keys <= sides[on.index(True)]:
            return dot
    reason = "no product in the score has the normalised axis on exactly one side"
    return refuse("no-key-axis", reason, anchor.node)


def _outside_conditions(score: Expr) -> set[str]:
    """Tensors read in a value, and not only where a mask or comparison decides."""
    found, queue = set(), [score]
    while queue:
        here = queue.pop()
        if isinstance(here, Read):
            found.add(here.tensor)
        elif isinstance(here, Call) and not is_boolean(here):
            queue += here.args[1:] if here.op == "where" else here.args
    return found


def _site(
    anchor: Anchor, dot: Dot, forward: Forward, module: fx.GraphModule, name: str
) -> Site | Refusal:
    axes = anchor.axes
    keys = set(axes.resolve(anchor.keys))
    left_has_keys = bool(keys & {a for d in dot.operand(True)[1] for a in axes.resolve(d)})
    factor, query = trim(*dot.operand(not left_has_keys), axes)
    factor_k, key = trim(*dot.operand(left_has_keys), axes)
    _, value = trim(forward.value.value, forward.value.value_dims, axes, scale=False)
    if _is_weight(key[0], module) and _is_weight(value[0], module):
        reason = "keys and values are weights: two projections with a softmax between, a lookup"
        return refuse("learned-keys", reason, anchor.node)
    keys = set(axes.resolve(anchor.keys))  # walking back may have split them
    rows = tuple(a for d in anchor.dims for a in axes.resolve(d) if a not in keys)
    roles = assign(rows, anchor.keys, dot, query, key, value, forward.value.features, axes)
    anchor = replace(anchor, score=_unshifted(anchor.score, keys, anchor))
    problem = _check(anchor, roles, query, key, value) or _scores_decide(anchor, dot, forward)
    if problem is not None:
        return problem
    raised = _raise(anchor, dot, forward, roles, factor * factor_k)
    if isinstance(raised, Refusal):
        return raised
    site = _assemble(anchor, forward, roles, (query, key, value), raised, module, name)
    channels = all(from_features(*t, roles.kv, axes) for t in (key, value))
    return replace(site, family="channel") if channels else site


def _is_weight(node: fx.Node, module: fx.GraphModule) -> bool:
    """True for a parameter of the model itself (buffers may be caches)."""
    if node.op == "get_attr":
        return isinstance(attribute(module, str(node.target)), torch.nn.Parameter)
    return bool(node.meta.get(PARAMETER))


def _check(
    anchor: Anchor, roles: Roles, query: Tensor, key: Tensor, value: Tensor
) -> Refusal | None:
    """Every operand has the axes its place asks for, and no other."""
    axes = anchor.axes
    for what, (node, dims), allowed in (
        ("query", query, "bhgqd"),
        ("key", key, ("b", "h", "kv", "d")),
        ("value", value, ("b", "h", "kv", "f")),
    ):
        for atom in (a for d in dims for a in axes.resolve(d)):
            if not roles.knows((atom,)) or roles.of(atom) not in allowed:
                has = roles.of(atom) if roles.knows((atom,)) else "an axis outside the scores"
                return refuse("axes-inconsistent", f"the {what} depends on {has}", node)
    needed = set(roles.kv)
    for what, (node, dims) in (("key", key), ("value", value)):
        if not needed <= {a for d in dims for a in axes.resolve(d)}:
            return refuse(
                "axes-inconsistent", f"the {what} does not depend on the normalised axis", node
            )
    if not isinstance(axes.extent(roles.h + roles.g), int):
        return refuse("dynamic-heads", "the number of heads is not static", anchor.node)
    return None


def _unshifted(score: Expr, keys: set[int], anchor: Anchor) -> Expr:
    """The score without the tensors it adds to, or takes from, a whole row: softmax cancels them.

    A mask of -inf may stand around the sum.  With a sink the row is not the whole softmax, and a
    log-sum-exp is shifted with its scores.
    """
    if anchor.sink is not None or anchor.lse is not None:
        return score
    match score:
        case Call("where", (condition, yes, no)):
            if yes == Const(-float("inf")):
                return call("where", condition, yes, _unshifted(no, keys, anchor))
            if no == Const(-float("inf")):
                return call("where", condition, _unshifted(yes, keys, anchor), no)
        case Call("sub" | "add", (a, b)) if _is_row(b, keys, anchor):
            return _unshifted(a, keys, anchor)
        case Call("add", (a, b)) if _is_row(a, keys, anchor):
            return _unshifted(b, keys, anchor)
        case Call("sub" | "add" as op, (a, b)):
            return call(op, _unshifted(a, keys, anchor), b)
    return score


def _is_row(expr: Expr, keys: set[int], anchor: Anchor) -> bool:
    """A tensor, perhaps times a number, that is read at no key: one number for a whole row."""
    if isinstance(expr, Call) and expr.op == "mul" and isinstance(expr.args[1], Const):
        expr = expr.args[0]
    leaf = anchor.lifter.leaves.get(expr.tensor) if isinstance(expr, Read) else None
    return leaf is not None and not keys & {a for d in leaf.dims for a in anchor.axes.resolve(d)}


def _shifts(anchor: Anchor) -> set[str]:
    """Tensors that are one number for a row and that no mask compares: a maximum that a bound keeps
    from cancelling (Grounding DINO) is read, and decides about no key."""
    plain = _outside_conditions(anchor.score)
    compared = {
        n.tensor
        for e in walk(anchor.score)
        if is_boolean(e)
        for n in walk(e)
        if isinstance(n, Read)
    }
    keys = set(anchor.axes.resolve(anchor.keys))
    return {
        name for name in plain - compared
        if name in anchor.lifter.leaves and _is_row(Read(name), keys, anchor)
    }  # fmt: skip


def _scores_decide(anchor: Anchor, dot: Dot, forward: Forward) -> Refusal | None:
    """Refuse a mask, factor or sink that the scores decide: it cannot be had without them."""
    scores = dot.product.node
    exprs = [e for e in (anchor.score, forward.weight, anchor.sink) if e is not None]
    used = {n.tensor for e in exprs for n in walk(e) if isinstance(n, Read)}
    used -= _shifts(anchor)
    for leaf in (anchor.lifter.leaves[n] for n in used if n in anchor.lifter.leaves):
        if _follows(leaf.node, scores):
            reason = f"a mask or factor ({leaf.node}) is computed from the scores themselves"
            return refuse("score-dependent-mask", reason, anchor.node)
    return None


def _follows(node: fx.Node, source: fx.Node) -> bool:
    """True if ``node`` is computed from ``source``; what stands before ``source`` is not."""
    seen, queue = {node}, [node]
    while queue:
        here = queue.pop()
        if here is source:
            return True
        new = [a for a in here.all_input_nodes if a not in seen and not a < source]
        seen.update(new)
        queue.extend(new)
    return False


def _raise(
    anchor: Anchor, dot: Dot, forward: Forward, roles: Roles, factor: float
) -> Raised | Refusal:
    """Score, guard and factor over ranks, with reads named M0, M1, ... in order of use."""
    lifter, axes = anchor.lifter, anchor.axes
    others: dict[Expr, Expr] = {
        Read(d.name): lifter.as_leaf(d) for d in lifter.dots.values() if d is not dot
    }
    product: Expr = Read(dot.name) if factor == 1.0 else Read(dot.name) * factor
    parts: list[Expr | None] = []
    for expr in (anchor.score, anchor.guard, forward.weight, anchor.sink):
        if expr is None:
            parts.append(None)
            continue
        expr = substitute(substitute(expr, others), {Read(dot.name): product})
        own = {n: _operand_of(n, anchor, roles) for n in _leaf_reads(expr, anchor)}
        # A tensor is read at whole ranks, also where the digits of one have no number for a radix.
        whole: dict[Expr, Expr] = {
            n: Read(n.tensor, tuple(Rank(r) for r in _ranks(o))) for n, o in own.items()
        }
        raised = in_ranks(substitute(expr, whole), roles, axes)
        if raised is None:
            return refuse(
                "symbolic-axes", "a mask or bias splits an axis of dynamic length", anchor.node
            )
        parts.append(normal(simplify(raised)))
    reads: dict[str, Operand] = {}
    mapping: dict[Expr, Expr] = {Read(dot.name): QK}
    for expr in parts:
        for read in _leaf_reads(TRUE if expr is None else expr, anchor):
            if read not in mapping:
                name = f"M{len(reads)}"
                reads[name] = _operand_of(read, anchor, roles)
                mapping[read] = Read(name, read.index)
    score, guard, weight, sink = (
        None if e is None else simplify(substitute(e, mapping)) for e in parts
    )
    assert score is not None
    assert guard is not None
    score, extra = split_guard(score)
    terms = (c for t in (*conjuncts(guard), *extra) for c in conjuncts(normal(t)))
    kept = tuple(dict.fromkeys(terms))
    return Raised(score, conjunction(kept), weight, sink, reads)


def _leaf_reads(expr: Expr, anchor: Anchor) -> list[Read]:
    """Reads of tensors of the graph, in order."""
    return [n for n in walk(expr) if isinstance(n, Read) and n.tensor in anchor.lifter.leaves]


def _operand_of(read: Read, anchor: Anchor, roles: Roles) -> Operand:
    leaf = anchor.lifter.leaves[read.tensor]
    return operand(leaf.node, leaf.dims, roles, anchor.axes)


def _ranks(own: Operand) -> tuple[str, ...]:
    roles = [f.role for d in own.dims for f in d]
    if "g" in roles and "h" not in roles:
        roles.append("h")
    return tuple(g[0] for g in canonical_groups(roles))


def scale_of(score: Expr) -> float:
    """The constant factor on the product (1.0 where it is not a constant)."""
    for node in walk(score):
        if (
            isinstance(node, Call)
            and node.op == "mul"
            and node.args[0] == QK
            and isinstance(node.args[1], Const)
        ):
            return float(node.args[1].value)
    return 1.0


def _assemble(
    anchor: Anchor,
    forward: Forward,
    roles: Roles,
    tensors: tuple[Tensor, Tensor, Tensor],
    raised: Raised,
    module: fx.GraphModule,
    name: str,
) -> Site:
    axes = anchor.axes
    group = axes.extent(roles.g)
    inputs = {
        n: operand(*t, roles, axes) for n, t in zip("QKV", tensors, strict=True)
    } | raised.reads
    kind, rope = kind_of(inputs["Q"], inputs["K"], roles)
    q_len = length_of(inputs["Q"], "q", axes.extent(roles.q))
    kv_len = length_of(inputs["K"], "kv", axes.extent(roles.kv))
    mask = causal_offset(raised.guard, raised.score)
    offset, causal = positions(mask, inputs["K"], kind, q_len, kv_len)
    if isinstance(offset, fx.Node):
        own = operand(offset, (roles.q,), roles, axes)
        inputs[POSITION] = own
        raised = replace(raised, reads=raised.reads | {POSITION: own})
        at = Read(POSITION, tuple(Rank(r) for r in _ranks(own)))
        offset = str(at % Extent("kv") - Rank("q"))  # an index may count from the end
    form = SoftmaxAttention(
        raised.score,
        raised.guard,
        raised.weight,
        raised.sink,
        group=int(group),
        reads=tuple(
            TensorDecl(n, _ranks(o), dtype=_dtype(o.node)) for n, o in raised.reads.items()
        ),
    )
    output = operand(forward.value.node, forward.value.out_dims, roles, axes)
    lse = None
    if anchor.lse is not None:
        lse = operand(*anchor.lse, roles, axes)
    results = [o.node for o in (output, lse) if o is not None]
    return Site(
        name=name,
        module=module_path(anchor.node),
        kind=kind,
        family="softmax",
        causal=causal,
        hq=int(axes.extent(roles.h + roles.g)),
        hkv=int(axes.extent(roles.h)),
        q_len=q_len,
        kv_len=kv_len,
        d_qk=axes.extent(roles.d),
        d_v=axes.extent(roles.f),
        scale=scale_of(raised.score),
        dropout=forward.dropout,
        rope=rope,
        layout=layout_text(inputs["Q"]),
        cascade=softmax_cascade(form, "site"),
        graph=module,
        anchor=anchor.node,
        nodes=region(results, [o.node for o in inputs.values()]),
        inputs=inputs,
        output=output,
        factors=tuple(f for g in groups(roles, axes, tuple((r,) for r in ROLE_ORDER)) for f in g),
        offset=offset,
        source=source_line(anchor.node),
        lse=lse,
    )


def _dtype(node: fx.Node) -> str:
    dtype = value_of(node).dtype
    if dtype == torch.bool:
        return "bool"
    return "float" if dtype.is_floating_point else "i64"
