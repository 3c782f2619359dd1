"""Exact FX passes: one normal form per meaning."""

from __future__ import annotations

import importlib

from torch import fx

from attn_rewrite.graph import GraphBuilder, copy_graph, has_effect, op_name, rounds
from attn_rewrite.memory import written
from attn_rewrite.passes.canonicalize.base import WRITES, Canonicalization
from attn_rewrite.passes.find.vmapped import mapped

# "module:Class" of every canonicalisation, in the order they are tried on a node; a new spelling is
# one line here.
SPELLINGS: tuple[str, ...] = (
    "disabled_autocast:DisabledAutocast",
    "alias:Alias",
    "alias:OfTwo",
    "alias:Repeat",
    "alias:MoveAxes",
    "gathered_heads:RepeatByIndex",
    "gathered_heads:RepeatByParts",
    "in_place:InPlace",
    "baddbmm:Baddbmm",
    "einsum_of_many:EinsumOfMany",
    "distance:SquaredDifference",
    "distance:SquaredDistance",
    "distance:CosineSimilarity",
    "placed:BooleanIndex",
    "placed:PaddedColumn",
    "totals:LastOfRunningSum",
    "totals:MeanTimesLength",
    "totals:ColumnsOfProduct",
    "product_sum:ProductSum",
    "log_sum_exp:EinsumOfOne",
    "log_sum_exp:LogSumExp",
    "log_sum_exp:ShiftedLogSumExp",
    "exponential:Exponential",
    "masked_exponential:MaskedExponential",
    "masked_exponential:Renormalised",
    "norm_of_exponential:NormOfExponential",
    "special_softmax:SpecialSoftmax",
    "log_softmax:LogSoftmax",
    "softmax_quotient:SoftmaxQuotient",
    "softmax_quotient:LateQuotient",
    "denominator_sink:DenominatorSink",
    "softmax_quotient:SoftmaxShift",
    "scaled_shift:ScaledShift",
    "safe_softmax:SafeSoftmax",
)


def _load(entry: str) -> Canonicalization:
    module, _, name = entry.partition(":")
    rule = getattr(importlib.import_module(f"{__name__}.{module}"), name)()
    assert isinstance(rule, Canonicalization)
    return rule


PIPELINE: tuple[Canonicalization, ...] = tuple(map(_load, SPELLINGS))

_PROVENANCE = ("nn_module_stack", "stack_trace", "source_fn_stack", "torch_fn")


def canonicalize(
    module: fx.GraphModule, pipeline: tuple[Canonicalization, ...] = PIPELINE
) -> fx.GraphModule:
    """A copy of ``module`` in normal form; the same object if nothing changed.

    Nodes of the copy carry the node of ``module`` with the same value as ``meta["origin"]``, where
    there is one.  Graphs called by higher-order operators (autocast, no_grad) are canonicalised
    too.
    """
    targets = {t: [p for p in pipeline if t in p.targets] for p in pipeline for t in p.targets}
    inner = {n: g for n, g in module.named_children() if isinstance(g, fx.GraphModule)}
    below = tuple(p for p in pipeline if not p.outermost)
    changed = {n: new for n, g in inner.items() if (new := canonicalize(g, below)) is not g}
    copy, _ = copy_graph(module)
    edits = _run(copy, targets)
    if not edits and not changed:
        return module
    for name, new in changed.items():
        setattr(copy, name, new)
    copy.graph.eliminate_dead_code(has_effect)
    copy.recompile()
    return copy


def _run(module: fx.GraphModule, targets: dict[str, list[Canonicalization]]) -> int:
    """Rewrite every node to a fixed point; the number of edits."""

    inside = mapped(module.graph)  # a mapped function stays as it is

    def rules(node: fx.Node) -> list[Canonicalization]:
        if node in inside:
            return []
        writes = targets.get(WRITES, []) if written(node) else []
        named = [] if rounds(node) else targets.get(op_name(node), [])  # no rule is for rounding
        return [*named, *writes]

    edits = 0
    queue = [n for n in module.graph.nodes if rules(n)]
    for node in queue:
        if node._erased:
            continue
        for rule in rules(node):
            build = GraphBuilder(module.graph)
            build.at(node, **{k: node.meta[k] for k in _PROVENANCE if k in node.meta})
            new = rule.rewrite(node, build)
            if new is None:
                continue
            edits += 1
            if new is node:  # it stays, and what reads it changed
                break
            node.replace_all_uses_with(new)
            new.meta["origin"] = node.meta.get("origin")
            module.graph.erase_node(node)
            queue.extend(n for n in (*build.memo.values(), *new.users) if rules(n))
            break
    return edits
