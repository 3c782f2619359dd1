"""A decoder whose cache of keys and values is stored in 8, 4 or 2 bits: policies ``kv_int*``.

The step of a decoder that goes on from a cache is captured (`decoding`), and each attention whose
keys are the past's with the new ones behind them becomes a `PackedLayer`: it takes queries and the
new keys and values, and holds all others as codes.  The past is no input any more and the present
no output; the length of the past is, as everything else about positions follows from it.

The prompt is read by the source module, in floating point, as KIVI has it (Liu et al. 2024, section
3.3); later calls see codes and the last tokens.  The state is the layers': `reset` empties it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from attn_rewrite.backends.torch.form import is_causal_with_offset, linear_score
from attn_rewrite.backends.torch.packed_cache import PackedCache
from attn_rewrite.cascade.attention import as_softmax
from attn_rewrite.cascade.expr import TRUE
from attn_rewrite.decoding import PAST
from attn_rewrite.errors import PolicyError
from attn_rewrite.graph import (
    GraphBuilder,
    arrange,
    copy_graph,
    extents,
    is_call,
    op_name,
    restore,
    through,
)
from attn_rewrite.passes.keep import Identity
from attn_rewrite.passes.quantize.kv_cache import QuantisedCache

if TYPE_CHECKING:
    from attn_rewrite.capture import Captured
    from attn_rewrite.plan import Plan, Step
    from attn_rewrite.site import Findings, Operand, Site


class PackedLayer(nn.Module):
    """The attention of one Site over a cache that it holds itself."""

    def __init__(self, cache: PackedCache, scale: float) -> None:
        super().__init__()
        self.cache, self.scale = cache, scale

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Queries [b, h, n, d] of ``n`` new tokens, whose keys and values are added first."""
        self.cache.append(k, v)
        return self.cache.attend(q, self.scale)


class PackedDecoder(nn.Module):
    """``decoder(input_ids)`` reads a prompt, then goes on from what it has read.  Approximate.

    Outputs are those of the source without ``past_key_values``: the past is held here, in few bits.
    Parameters are shared with the source.  No gradient: it is for inference.
    """

    def __init__(
        self, graph: fx.GraphModule, source: nn.Module, names: tuple[str, ...],
        places: Mapping[str, tuple[int, int]], spec: pytree.TreeSpec,
    ) -> None:  # fmt: skip
        super().__init__()
        self.graph = graph
        self._names, self._places, self._spec = names, dict(places), spec
        object.__setattr__(self, "_source", source)  # its parameters are those of the graph

    @property
    def layers(self) -> dict[str, PackedLayer]:
        """The layers by the name of their module in the graph."""
        return {n: m for n, m in self.graph.named_children() if isinstance(m, PackedLayer)}

    @property
    def length(self) -> int:
        """Tokens read."""
        return next(iter(self.layers.values())).cache.length

    @property
    def nbytes(self) -> int:
        """Bytes that the caches of all layers take, windows in floating point included."""
        return sum(layer.cache.nbytes for layer in self.layers.values())

    def reset(self) -> None:
        """Forget everything."""
        for layer in self.layers.values():
            layer.cache.reset()

    @torch.no_grad()
    def forward(self, input_ids: Tensor, **inputs: Any) -> Any:
        """Logits of new tokens [b, n] behind those read before."""
        given = {"input_ids": input_ids, "use_cache": True, **inputs}
        if not self.length:
            return self._read(given)
        unknown = [n for n in given if n not in self._names]
        missing = [n for n in self._names if n not in given]
        if unknown or missing:
            raise PolicyError(
                f"a step takes {', '.join(self._names)}, as it was captured, and got "
                f"{', '.join(given)}"
            )
        flat = [leaf for n in self._names for leaf in pytree.tree_leaves(given[n])]
        found = self.graph(*flat, self.length)
        return _without_past(pytree.tree_unflatten(list(found), self._spec))

    def _read(self, given: dict[str, Any]) -> Any:
        """The prompt, by the source module; its keys and values are packed."""
        from transformers import DynamicCache

        source: nn.Module = self.__dict__["_source"]
        output = source(**given, **{PAST: DynamicCache()})
        leaves = pytree.tree_leaves(output[PAST])
        for name, layer in self.layers.items():
            k, v = self._places[name]
            layer.cache.append(leaves[k], leaves[v])
        return _without_past(output)


def _without_past(output: Any) -> Any:
    kept = {n: value for n, value in output.items() if n != PAST}
    return type(output)(**kept)


# Making one


@dataclass(frozen=True, eq=False)
class _Layer:
    """What is packed of a Site: its new keys and values, and the inputs that hold the past ones."""

    site: Site
    scheme: QuantisedCache
    scale: float
    keys: fx.Node
    values: fx.Node
    past: tuple[fx.Node, fx.Node]


def packed_decoder(
    captured: Captured, findings: Findings, plan: Plan, source: nn.Module
) -> PackedDecoder:
    """The decoder that ``captured``, a step with a past, becomes under ``plan``.

    Every attention must have a ``kv_int*`` scheme on all heads and nothing else, a causal mask and
    a scaled product as score.  Raises `PolicyError` with the first reason against it.
    """
    if not findings.sites:
        raise PolicyError("the cache cannot be packed: no attention was found in the step")
    layers = [_layer(site, plan.of(site.name)) for site in findings.sites]
    graph, twins = copy_graph(captured.graph)
    places = {n: i for i, n in enumerate(_past_inputs(captured))}
    names: dict[str, tuple[int, int]] = {}
    for number, layer in enumerate(layers):
        name = f"packed_{number}"
        cache = PackedCache(layer.scheme.bits, layer.scheme.group, layer.scheme.residual)
        graph.add_module(name, PackedLayer(cache, layer.scale))
        _replace(graph.graph, name, layer, twins)
        names[name] = (places[layer.past[0]], places[layer.past[1]])
    kwargs = {n: v for n, v in captured.kwargs.items() if n != PAST}
    spec = captured.program.call_spec.out_spec
    assert spec is not None
    _without_cache(graph, [twins[n] for n in places], layers, twins)
    return PackedDecoder(graph, source, tuple(kwargs), names, spec)


def _past_inputs(captured: Captured) -> list[fx.Node]:
    """The inputs that hold the past, in the order of its leaves."""
    inputs = [n for n in captured.graph.graph.nodes if n.op == "placeholder"]
    start = 0
    for name, value in captured.kwargs.items():
        count = len(pytree.tree_leaves(value))
        if name == PAST:
            return inputs[start : start + count]
        start += count
    raise PolicyError("the cache cannot be packed: the step has no past")


def _layer(site: Site, steps: Iterable[Step]) -> _Layer:
    scheme = _scheme(site, tuple(steps))
    form = as_softmax(site.cascade)
    score = None if form is None else linear_score(form.score)
    plain = form is not None and form.weight is None and form.sink is None and not form.reads
    if form is None or score is None or score.bias is not None or not plain:
        raise _refusal(site, "its score is more than a scaled product, or its mask reads a tensor")
    if form.guard != TRUE and not is_causal_with_offset(form.guard):
        raise _refusal(
            site, f"its mask is {form.guard}, and a packed cache is read up to each query"
        )
    if site.lse is not None:
        raise _refusal(site, "its log-sum-exp is used")
    if form.guard == TRUE:
        raise _refusal(site, "it is not causal")
    if not isinstance(site.d_v, int) or site.dropout:
        raise _refusal(site, "it drops probabilities")
    (keys, past_keys), (values, past_values) = (_grown(site, n) for n in ("K", "V"))
    return _Layer(site, scheme, score.scale, keys, values, (past_keys, past_values))


def _refusal(site: Site, reason: str) -> PolicyError:
    return PolicyError(f"the cache of {site.name} cannot be packed: {reason}")


def _scheme(site: Site, steps: tuple[Step, ...]) -> QuantisedCache:
    """The one scheme that the steps of a Site name."""
    named = [t for s in steps for t in s.transforms if not isinstance(t, Identity)]
    one = named[0] if len(set(named)) == 1 else None
    mine = [s for s in steps if one in s.transforms]
    heads = {h for s in mine for h in (range(site.hq) if s.heads is None else s.heads)}
    if not isinstance(one, QuantisedCache) or len(heads) < site.hq:
        said = "; ".join(s.label for s in steps) or "nothing"
        raise _refusal(
            site, f"its policy is {said}, expected kv_int8, kv_int4 or kv_int2 on every head"
        )
    return one


def _grown(site: Site, name: str) -> tuple[fx.Node, fx.Node]:
    """The new tokens of an operand, and the input that the tokens before them come from."""
    operand: Operand = site.inputs[name]
    roles = [{f.role for f in dim} for dim in operand.dims]
    node = _host(_whole(site, name))
    parts = node.args[0] if is_call(node, "cat") else ()
    if roles[:3] != [{"b"}, {"h"}, {"kv"}] or len(parts) != 2 or node.args[1] not in (2, -2):  # type: ignore[arg-type]
        raise _refusal(
            site, f"{name} is no past with the new tokens behind it, by batch, head and token"
        )
    past, new = parts  # type: ignore[misc]
    inputs = _inputs_of(past)  # type: ignore[arg-type]
    if len(inputs) != 1:
        raise _refusal(site, f"the past of {name} comes from {len(inputs)} inputs, expected one")
    return new, inputs[0]  # type: ignore[return-value]


def _whole(site: Site, name: str) -> fx.Node:
    """Past and new tokens of an operand together."""
    node = site.inputs[name].node
    found: fx.Node = through(node, "contiguous", "clone", "alias", "detach", "slice")
    return found


def _host(node: fx.Node) -> fx.Node:
    """The node of the captured graph that a node of its canonical copy stands for."""
    while "origin" in node.meta:
        node = node.meta["origin"]
    return node


def _inputs_of(node: fx.Node) -> list[fx.Node]:
    queue, seen = [node], {node}
    while queue:
        for source in queue.pop().all_input_nodes:
            if source not in seen:
                seen.add(source)
                queue.append(source)
    return [n for n in seen if n.op == "placeholder"]


def _replace(graph: fx.Graph, name: str, layer: _Layer, twins: Mapping[fx.Node, fx.Node]) -> None:
    """The Site's output from the layer called ``name``."""
    site = layer.site
    output = twins[_host(site.output.node)]
    build = GraphBuilder(graph).at(output)
    query = twins[_host(site.inputs["Q"].node)]
    sizes = {f.axis: f.extent for f in site.factors if isinstance(f.extent, int)}
    sizes |= extents(build, {"Q": (site.inputs["Q"], query)})
    q = arrange(build, site.inputs["Q"], query, site.groups("Q"), sizes)
    with graph.inserting_before(output):
        new = graph.call_module(name, (q, twins[layer.keys], twins[layer.values]))
    shape = [*q.meta["val"].shape[:3], site.d_v]
    new.meta["val"] = q.meta["val"].new_empty(shape)
    output.replace_all_uses_with(restore(build, new, site.groups("AV"), site.output, sizes))


def _without_cache(
    module: fx.GraphModule, past: list[fx.Node], layers: list[_Layer],
    twins: Mapping[fx.Node, fx.Node],
) -> None:  # fmt: skip
    """Take the past out of the inputs and the present out of the outputs."""
    from attn_rewrite.apply import relax_views, sweep

    graph = module.graph
    _without_present(graph, layers, twins)
    inputs = [n for n in graph.nodes if n.op == "placeholder"]
    with graph.inserting_after(inputs[-1]):
        length = graph.placeholder("past_length")
    batch = next(n for n in inputs if n not in past and isinstance(n.meta.get("val"), Tensor))
    graph.set_codegen(fx.graph.CodeGen())
    for node in list(graph.nodes):
        if op_name(node) == "_guards_fn" or node.target == "_guards_fn":
            graph.erase_node(node)
        elif is_call(node, "sym_size") and node.args[0] in past:
            _size_of_past(node, batch, length)
        elif node.op == "call_module" and isinstance(getattr(module, node.target), PackedLayer):
            relax_views(node)
    sweep(graph)
    for node in past:
        if node.users:
            raise PolicyError(
                f"the cache cannot be packed: {next(iter(node.users))} reads the past {node} and "
                "is no attention that was found"
            )
        graph.erase_node(node)
    graph.lint()
    module.recompile()


def _without_present(
    graph: fx.Graph, layers: list[_Layer], twins: Mapping[fx.Node, fx.Node]
) -> None:
    """The new keys and values in the place of all of them among the outputs."""
    present = {}
    for layer in layers:
        for name, new in (("K", layer.keys), ("V", layer.values)):
            present[twins[_host(_whole(layer.site, name))]] = twins[new]
    output = next(n for n in reversed(graph.nodes) if n.op == "output")
    output.args = ([present.get(n, n) for n in pytree.tree_leaves(output.args[0])],)


def _size_of_past(node: fx.Node, batch: fx.Node, length: fx.Node) -> None:
    """The past's length is an input; its batch is that of everything else."""
    if node.args[1] in (2, -2):
        node.replace_all_uses_with(length)
    elif node.args[1] == 0:
        node.args = (batch, 0)
