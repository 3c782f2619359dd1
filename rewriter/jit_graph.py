"""One graph that Dynamo captured: found, rewritten for each layer it serves, compiled, called.

After a graph break one graph may serve every layer of a loop (`owners`).  Its Sites have another
name in each, so that rules for layers may ask for different kernels: each different one is compiled
while Dynamo compiles the graph, and a call takes the one of the layer it is for.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from torch import fx

from attn_rewrite import knobs
from attn_rewrite.owners import Owners, placed
from attn_rewrite.policy import Policy, Rule, Where, glob_matches
from attn_rewrite.site import Findings, Refusal, Site

if TYPE_CHECKING:
    from attn_rewrite.plan import Step

Compile = Callable[[fx.GraphModule], Callable[..., Any]]


@dataclass(frozen=True, eq=False)
class GraphRecord:
    """One graph in one layer: its sites, how each is computed, and the refusals."""

    sites: tuple[Site, ...]
    kernels: dict[str, str]  # site -> kernel; sites left as they are do not appear
    refusals: tuple[Refusal, ...]
    steps: tuple[Step, ...] = ()


@dataclass(frozen=True, eq=False)
class FoundGraph:
    """A captured graph, the same retraced, and what was found in it."""

    captured: fx.GraphModule
    traced: fx.GraphModule
    findings: Findings
    dumper: knobs.Dumper

    def rewrite(
        self, findings: Findings, policy: Policy, backend: str
    ) -> tuple[fx.GraphModule, GraphRecord]:
        """Plan, lower and splice the Sites under the names they have in ``findings``."""
        from attn_rewrite.apply import settle, splice
        from attn_rewrite.driver import Stopwatch, decide, graph_text, replacements
        from attn_rewrite.retrace import is_flex

        if not findings.sites:
            flex = any(map(is_flex, self.captured.graph.nodes))
            left = self.captured if flex else self.traced
            return left, _recorded(GraphRecord((), {}, findings.refusals))
        watch = Stopwatch(dumper=self.dumper)
        plan, decisions = decide(findings, _for_graph(policy, findings.sites), None, watch, backend)
        done = {d.site.name: d.kernel.name for d in decisions if d.kernel is not None}
        said = tuple(d.refusal for d in decisions if d.refusal is not None)
        refusals = (*findings.refusals, *plan.refusals, *said)
        rewritten = splice(self.traced, replacements(decisions))
        if any(map(is_flex, rewritten.graph.nodes)):
            refusals = (*refusals, *_blocks_needed(rewritten))
            return self.captured, _recorded(GraphRecord(findings.sites, {}, refusals))
        if rewritten is not self.traced:
            settle(rewritten)
        self.dumper.write("spliced", lambda: graph_text(rewritten), suffix=".fx")
        return rewritten, _recorded(GraphRecord(findings.sites, done, refusals, plan.steps))


def find_in(captured: fx.GraphModule, inputs: list[Any]) -> FoundGraph:
    """Retrace a graph of Dynamo's and find its attention."""
    from attn_rewrite.driver import graph_text
    from attn_rewrite.passes.canonicalize import canonicalize
    from attn_rewrite.passes.find import find
    from attn_rewrite.retrace import retrace, without_blocks

    dumper = knobs.Dumper(knobs.graph_directory())
    traced = retrace(without_blocks(captured), inputs)
    dumper.write("capture", lambda: graph_text(traced), suffix=".fx")
    host = canonicalize(traced)
    dumper.write("canonicalize", lambda: graph_text(host), suffix=".fx")
    return FoundGraph(captured, traced, find(host), dumper)


@dataclass
class LayerGraph:
    """A graph and every layer that it serves.

    ``compile`` makes a callable of a rewritten graph, ``rename`` numbers the Sites of each module,
    ``record`` is told what happened the first time that a layer is met.
    """

    found: FoundGraph
    policy: Policy
    backend: str
    compile: Compile
    rename: Callable[[Findings], Findings]
    record: Callable[[GraphRecord], None]
    owners: Owners
    compiled: dict[tuple[bool, ...], tuple[Callable[..., Any], GraphRecord]] = field(
        default_factory=dict
    )
    served: dict[str | None, Callable[..., Any]] = field(default_factory=dict)

    def prepare(self, inputs: Sequence[Any]) -> Callable[..., Any]:
        """Compile what the layers need; the callable chooses where there is more than one layer."""
        if not self.found.findings.sites:
            graph, record = self.found.rewrite(self.found.findings, self.policy, self.backend)
            self.record(record)
            return self.compile(graph)
        first = self.owners.of(inputs, self.local)
        run = self._serve(first)
        layers = () if first is None else self.owners.candidates(self.local, first)
        if len(layers) == 1 or self.owners.root is None:
            return run
        for layer in layers:
            self._compiled(self._findings(layer))
        return self.run

    def run(self, *inputs: Any) -> Any:
        """Run the graph for the layer that ``inputs`` belong to."""
        owner = self.owners.of(inputs, self.local)
        known = self.served.get(owner)
        return (self._serve(owner) if known is None else known)(*inputs)

    @cached_property
    def local(self) -> str | None:
        """The name of the layer in the graph's own frame."""
        return self.owners.local(next(iter(self.found.findings.sites), None))

    @cached_property
    def _globs(self) -> tuple[str, ...]:
        return tuple(g for rule in self.policy.rules for g in rule.where.layer)

    def _findings(self, owner: str | None) -> Findings:
        return self.rename(placed(self.found.findings, owner or ""))

    def _compiled(self, findings: Findings) -> tuple[Callable[..., Any], GraphRecord]:
        """The callable and what is said of it; layers that the same rules mean share it."""
        key = tuple(glob_matches(g, s) for g in self._globs for s in findings.sites)
        if key not in self.compiled:
            graph, record = self.found.rewrite(findings, self.policy, self.backend)
            self.compiled[key] = self.compile(graph), record
        run, record = self.compiled[key]
        return run, _renamed(record, findings.sites)

    def _serve(self, owner: str | None) -> Callable[..., Any]:
        """The callable for a layer that is met for the first time; its Sites are recorded."""
        lost = owner is None and self.owners.root is not None
        if lost and self._globs:
            self.record(self._unknown())
            self.served[owner] = self.found.captured.forward
        else:
            self.served[owner], record = self._compiled(self._findings(owner))
            self.record(record)
        return self.served[owner]

    def _unknown(self) -> GraphRecord:
        """A layer that cannot be told has no rules: that is said, and it runs as it was written."""
        reason = (
            "the layer that this graph runs for cannot be told from its inputs, and the policy has "
            "rules for layers: it runs as it was captured; leave layers out of the policy, or "
            "avoid the graph break"
        )
        warnings.warn(reason, stacklevel=2)
        sites, said = self.found.findings.sites, self.found.findings.refusals
        lost = (Refusal("unknown-layer", reason, str(s.anchor), s.source, s.name) for s in sites)
        return _recorded(GraphRecord(sites, {}, (*said, *lost)))


def _renamed(record: GraphRecord, sites: tuple[Site, ...]) -> GraphRecord:
    """What was said of the same Sites under other names."""
    names = {old.name: new.name for old, new in zip(record.sites, sites, strict=True)}
    if all(old == new for old, new in names.items()):
        return record
    return GraphRecord(
        sites,
        {names[name]: kernel for name, kernel in record.kernels.items()},
        tuple(replace(r, site=names.get(r.site or "", r.site)) for r in record.refusals),
        tuple(replace(step, site=names[step.site]) for step in record.steps),
    )


def _blocks_needed(rewritten: fx.GraphModule) -> tuple[Refusal, ...]:
    """Why a graph with a call of flex_attention that stays is left as it is."""
    from attn_rewrite.graph import source_line
    from attn_rewrite.retrace import is_flex

    node = next(filter(is_flex, rewritten.graph.nodes))
    reason = (
        "a call of flex_attention stays in this graph, and its block lists cannot be traced again "
        "just in time: the whole graph is left as it is"
    )
    return (Refusal("flex-blocks", reason, str(node.format_node()), source_line(node)),)


def _recorded(record: GraphRecord) -> GraphRecord:
    """Tell the refusals of a graph where the debug level asks for them."""
    knobs.tell(2, lambda: "\n".join(["refusals", *map(str, record.refusals)]))
    return record


def _for_graph(policy: Policy, sites: tuple[Site, ...]) -> Policy:
    """The rules whose layers occur in this graph: another graph of the model may hold the rest."""
    rules = [
        r for r in policy.rules
        if not r.where.layer or any(glob_matches(g, s) for g in r.where.layer for s in sites)
    ]  # fmt: skip
    return Policy(rules or [Rule(Where(), "keep")])
