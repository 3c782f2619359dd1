"""The torch.compile front end: rewrite each graph Dynamo captures, then compile it.

``torch.compile(model, backend="attn_rewrite", options={"policy": "window(size=256)"})``.  Options:
``policy`` (text, path of a policy file, or `Policy`), ``compiler`` (``"inductor"``, the default,
``"aot_eager"`` or ``"eager"``), ``session`` (a `Session` that collects what happened), ``backend``
(``"auto"``, ``"torch"`` or ``"triton"``: what computes the rewritten attention).  Gradients
survive: AOTAutograd and Inductor run after the rewrite.  ``ATTN_REWRITE_DUMP`` gets one folder
``graph-00``, ``graph-01``, ... per captured graph.  Nothing is measured here, as the graphs
hold no values: a policy with a budget is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from attn_rewrite import knobs
from attn_rewrite.errors import PolicyError
from attn_rewrite.gates import refuse_gates
from attn_rewrite.lowering import check_backend
from attn_rewrite.optimized import OptimizedModule
from attn_rewrite.passes.transform import Exactness
from attn_rewrite.policy import Policy
from attn_rewrite.site import Refusal, Site

if TYPE_CHECKING:
    from attn_rewrite.plan import Plan, Step
    from attn_rewrite.report import Report

COMPILERS = ("inductor", "aot_eager", "eager")
OPTIONS = ("policy", "compiler", "session", "backend")


@dataclass(frozen=True, eq=False)
class GraphRecord:
    """One graph that was compiled: its sites, how each is computed, and the refusals."""

    sites: tuple[Site, ...]
    kernels: dict[str, str]  # site -> kernel; sites left as they are do not appear
    refusals: tuple[Refusal, ...]
    steps: tuple[Step, ...] = ()


@dataclass
class Session:
    """What happened in the graphs of one compiled model, in order; `clear` forgets it."""

    graphs: list[GraphRecord] = field(default_factory=list)

    def clear(self) -> None:
        """Forget every graph."""
        self.graphs.clear()

    @property
    def sites(self) -> tuple[Site, ...]:
        """The sites by name, as last seen."""
        return tuple({s.name: s for g in self.graphs for s in g.sites}.values())

    @property
    def refusals(self) -> tuple[Refusal, ...]:
        """Every refusal, each once."""
        return tuple(
            {(r.code, r.reason, r.site): r for g in self.graphs for r in g.refusals}.values()
        )


def attn_rewrite(
    gm: fx.GraphModule,
    example_inputs: list[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: Any = None,
) -> Callable[..., Any]:
    """The backend registered with Dynamo (entry point ``torch_dynamo_backends``)."""
    options = dict(options or {})
    policy, compiler = read_options(options)
    rewritten, record = rewrite_graph(gm, example_inputs, policy, options.get("backend", "auto"))
    session = options.get("session")
    if session is not None:
        session.graphs.append(record)
    if compiler == "eager":
        return rewritten.forward
    if compiler == "aot_eager":
        from torch._dynamo.backends.debugging import aot_eager

        traced: Callable[..., Any] = aot_eager(rewritten, example_inputs)
        return traced
    from torch._inductor.compile_fx import compile_fx

    inner: Callable[..., Any] = compile_fx(rewritten, example_inputs)  # type: ignore[assignment]
    return inner


def read_options(options: Mapping[str, Any]) -> tuple[Policy, str]:
    """(policy, compiler) from the options of the backend; `PolicyError` for anything unknown."""
    for name in options:
        if name not in OPTIONS:
            raise PolicyError(
                f"the attn_rewrite backend has no option {name!r}; it has {', '.join(OPTIONS)}"
            )
    compiler = options.get("compiler", "inductor")
    if compiler not in COMPILERS:
        raise PolicyError(f"compiler {compiler!r} is not known; expected {' or '.join(COMPILERS)}")
    check_backend(options.get("backend", "auto"))
    policy = options.get("policy", "exact")
    if isinstance(policy, str):
        policy = Policy.load(policy) if Path(policy).suffix == ".toml" else Policy.parse(policy)
    if policy.budget is not None:
        raise PolicyError(
            "a budget needs measurements, and graphs captured just in time have no values: give "
            "optimize() example inputs, or leave the budget out"
        )
    refuse_gates(policy)
    return policy, compiler


def rewrite_graph(
    gm: fx.GraphModule, example_inputs: list[Any], policy: Policy, backend: str = "auto"
) -> tuple[fx.GraphModule, GraphRecord]:
    """Retrace, find, plan, lower and splice one graph."""
    from attn_rewrite.apply import settle, splice
    from attn_rewrite.driver import Stopwatch, decide, graph_text, replacements
    from attn_rewrite.passes.canonicalize import canonicalize
    from attn_rewrite.passes.find import find
    from attn_rewrite.retrace import is_flex, retrace, without_blocks

    opaque = _opaque(gm)
    if opaque is not None:
        return gm, _recorded(GraphRecord((), {}, (opaque,)))
    watch = Stopwatch(dumper=knobs.Dumper(knobs.graph_directory()))
    dump = watch.dumper.write
    traced = retrace(without_blocks(gm), example_inputs)
    dump("capture", lambda: graph_text(traced), suffix=".fx")
    host = canonicalize(traced)
    dump("canonicalize", lambda: graph_text(host), suffix=".fx")
    findings = find(host)
    if not findings.sites:
        left = gm if any(map(is_flex, gm.graph.nodes)) else traced
        return left, _recorded(GraphRecord((), {}, findings.refusals))
    plan, decisions = decide(findings, _for_graph(policy, findings.sites), None, watch, backend)
    done = {d.site.name: d.kernel.name for d in decisions if d.kernel is not None}
    said = tuple(d.refusal for d in decisions if d.refusal is not None)
    refusals = (*findings.refusals, *plan.refusals, *said)
    rewritten = splice(traced, replacements(decisions))
    if any(map(is_flex, rewritten.graph.nodes)):
        return gm, _recorded(
            GraphRecord(findings.sites, {}, (*refusals, *_blocks_needed(rewritten)))
        )
    record = GraphRecord(findings.sites, done, refusals, plan.steps)
    if rewritten is not traced:
        settle(rewritten)
    dump("spliced", lambda: graph_text(rewritten), suffix=".fx")
    return rewritten, _recorded(record)


# Operators with a graph of their own inside that cannot be traced again.
_OPAQUE = {
    "tag_activation_checkpoint": "activation checkpointing",
}


def _opaque(gm: fx.GraphModule) -> Refusal | None:
    """Why a graph is left to the compiler as it is: it calls an operator of `_OPAQUE`."""
    from attn_rewrite.graph import source_line

    for node in gm.graph.nodes:
        name = getattr(node.target, "__name__", "")
        if node.op == "call_function" and name in _OPAQUE:
            reason = (
                f"the graph holds {_OPAQUE[name]}, whose inside cannot be traced again just in "
                "time; capture it ahead of time with example inputs, or leave that out"
            )
            return Refusal("opaque-operator", reason, str(node.format_node()), source_line(node))
    return None


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
    from attn_rewrite.policy import Rule, Where, glob_matches

    rules = [
        r for r in policy.rules
        if not r.where.layer or any(glob_matches(g, s) for g in r.where.layer for s in sites)
    ]  # fmt: skip
    return Policy(rules or [Rule(Where(), "keep")])


class JustInTimeModule(OptimizedModule):
    """A model whose graphs are rewritten as they are captured, call by call.

    It *is* the source module for parameters, buffers, mode and device; ``sites`` and ``session``
    fill as graphs are compiled.  ``generate`` and other methods of the source run the rewritten
    forward.
    """

    def __init__(
        self, source: nn.Module, policy: Policy, compiler: str, backend: str = "auto"
    ) -> None:
        nn.Module.__init__(self)
        self._hold("_source", source)
        self._hold("_folder", None)  # nothing is saved: what is not here is the source's
        self._hold("_policy", (policy, compiler, backend))
        self._hold("session", Session())
        for table in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            self._hold(table, getattr(source, table))
        options = {
            "policy": policy, "compiler": compiler, "session": self.session, "backend": backend,
        }  # fmt: skip
        self._hold(
            "_compiled", torch.compile(source.forward, backend=attn_rewrite, options=options)
        )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the source's forward, rewritten and compiled."""
        return self._compiled(*args, **kwargs)

    @property
    def sites(self) -> tuple[Site, ...]:  # type: ignore[override]
        """Every site of the graphs compiled so far."""
        session: Session = self.session
        return session.sites

    @property
    def plan(self) -> Plan:  # type: ignore[override]
        """The steps taken in the graphs compiled so far."""
        from attn_rewrite.plan import Plan

        steps: dict[str, Step] = {}
        for graph in self.session.graphs:
            steps.update({step.site: step for step in graph.steps})
        return Plan(tuple(steps.values()), self.session.refusals, str(self._policy[0]))

    @property
    def report(self) -> Report:  # type: ignore[override]
        """What was done in the graphs compiled so far; nothing is measured just in time."""
        from attn_rewrite.report import Report, SiteReport
        from attn_rewrite.saved import versions

        plan, kernels = self.plan, {k: v for g in self.session.graphs for k, v in g.kernels.items()}
        said = self.session.refusals
        sites = tuple(
            SiteReport(
                name=site.name,
                facts=site.facts(),
                steps=tuple(step.label for step in plan.of(site.name)),
                kernel=kernels.get(site.name),
                exactness=plan.exactness_of(site.name).value,
                refusals=tuple(r for r in said if r.site == site.name),
                unbudgeted=plan.exactness_of(site.name) is Exactness.APPROXIMATE,
            )
            for site in self.sites
        )
        names = {site.name for site in sites}
        return Report(
            sites=sites,
            refusals=tuple(r for r in said if r.site not in names),
            versions=versions(),
            inputs="none: captured just in time",
            notes=(f"graphs compiled so far: {len(self.session.graphs)}; nothing was measured",),
        )

    @property
    def training(self) -> bool:
        """The mode of the source."""
        return bool(self._source.training)

    @training.setter
    def training(self, value: bool) -> None:
        pass  # `nn.Module.__init__` sets it before there is a source

    def train(self, mode: bool = True) -> JustInTimeModule:
        """Set the mode of the source; the next call captures again if it matters."""
        self._source.train(mode)
        return self

    def _apply(
        self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True
    ) -> JustInTimeModule:
        self._source._apply(fn, recurse)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> JustInTimeModule:
        import copy

        return JustInTimeModule(copy.deepcopy(self._source, memo), *self._policy)


def compiled(
    model: nn.Module, policy: Policy, compiler: str = "inductor", backend: str = "auto"
) -> JustInTimeModule:
    """`optimize` without example inputs: the first call captures."""
    read_options({"policy": policy, "backend": backend})
    return JustInTimeModule(model, policy, compiler, backend)
