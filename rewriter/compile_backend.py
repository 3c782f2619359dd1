"""The torch.compile front end: rewrite each graph Dynamo captures, then compile it.

``torch.compile(model, backend="attn_rewrite", options={"policy": "window(size=256)"})``.  Options:
``policy`` (text, path of a policy file, or `Policy`), ``compiler`` (``"inductor"``, the default,
``"aot_eager"`` or ``"eager"``), ``session`` (a `Session` that collects what happened), ``backend``
(``"auto"``, ``"torch"`` or ``"triton"``: what computes the rewritten attention).  Gradients
survive: AOTAutograd and Inductor run after the rewrite.  ``ATTN_REWRITE_DUMP`` gets one folder
``graph-00``, ``graph-01``, ... per captured graph.  Nothing is measured here, as the graphs
hold no values: a policy with a budget is refused.  Sites are named by their place in the compiled
model also where one graph serves many layers, and rules for layers are those of each call's layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from attn_rewrite.errors import PolicyError
from attn_rewrite.gates import refuse_gates
from attn_rewrite.jit_graph import GraphRecord, LayerGraph, find_in
from attn_rewrite.lowering import check_backend
from attn_rewrite.optimized import OptimizedModule
from attn_rewrite.owners import Numbers, Owners
from attn_rewrite.passes.transform import Exactness
from attn_rewrite.policy import Policy, glob_matches
from attn_rewrite.site import Refusal, Site

if TYPE_CHECKING:
    from attn_rewrite.plan import Plan, Step
    from attn_rewrite.report import Report

COMPILERS = ("inductor", "aot_eager", "eager")
OPTIONS = ("policy", "compiler", "session", "backend")


@dataclass
class Session:
    """What happened in the graphs of one compiled model, in order; `clear` forgets it.

    A graph that serves several layers has a record for each of them, from the first call on.
    """

    graphs: list[GraphRecord] = field(default_factory=list)
    numbers: Numbers = field(default_factory=Numbers)

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
    session = options.get("session")
    session = Session() if session is None else session

    def compile_for(rewritten: fx.GraphModule) -> Callable[..., Any]:
        return _compiled(rewritten, example_inputs, compiler)

    graph = LayerGraph(
        found=find_in(gm, example_inputs),
        policy=policy,
        backend=options.get("backend", "auto"),
        compile=compile_for,
        rename=session.numbers.give,
        record=session.graphs.append,
        owners=Owners(gm.graph),
    )
    return graph.prepare(example_inputs)


def _compiled(
    rewritten: fx.GraphModule, example_inputs: list[Any], compiler: str
) -> Callable[..., Any]:
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
    policy = Policy.of(options.get("policy", "exact"))
    if policy.budget is not None:
        raise PolicyError(
            "a budget needs measurements, and graphs captured just in time have no values: give "
            "optimize() example inputs, or leave the budget out"
        )
    refuse_gates(policy)
    return policy, compiler


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
            notes=(
                f"graphs compiled so far: {len(self.session.graphs)}; nothing was measured",
                *self._unmet(),
            ),
        )

    def _unmet(self) -> tuple[str, ...]:
        """Rules for layers that no Site was in so far."""
        policy: Policy = self._policy[0]
        globs = dict.fromkeys(g for rule in policy.rules for g in rule.where.layer)
        return tuple(
            f"layer {glob!r} of the policy matched no Site so far"
            for glob in globs if not any(glob_matches(glob, s) for s in self.sites)
        )  # fmt: skip

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
