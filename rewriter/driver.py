"""The driver: capture, canonicalise, find, plan, rewrite, lower, splice, verify.

`optimize` reads like the line above; every step is a function of values, and the report holds what
each of them said and took.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import fx, nn

from attn_rewrite import knobs
from attn_rewrite.apply import Replacement, fold_into_kernels, settle, splice
from attn_rewrite.backends.torch.lower import Kernel
from attn_rewrite.calls import CallForm
from attn_rewrite.capture import Captured, capture_model
from attn_rewrite.cascade.ir import Cascade
from attn_rewrite.errors import PolicyError
from attn_rewrite.gates import Gate, gates_of
from attn_rewrite.lowering import check_backend, lower_site
from attn_rewrite.passes.canonicalize import canonicalize
from attn_rewrite.passes.find import find
from attn_rewrite.passes.quantize.base import Quantisation
from attn_rewrite.passes.reorder.settle import Gathers
from attn_rewrite.plan import Plan, make_plan, rewritten
from attn_rewrite.plan_checks import check_sites
from attn_rewrite.policy import Policy
from attn_rewrite.site import Findings, Refusal, Site
from attn_rewrite.tables import Table

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from attn_rewrite.budget import Budget
    from attn_rewrite.optimized import OptimizedModule
    from attn_rewrite.packed_decoder import PackedDecoder


@dataclass
class Stopwatch:
    """Seconds per stage, in the order the stages ran, and their dumps."""

    seconds: dict[str, float] = field(default_factory=dict)
    dumper: knobs.Dumper = field(default_factory=lambda: knobs.Dumper(knobs.dump_directory()))

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


@dataclass(frozen=True, eq=False)
class Decision:
    """What happens to one site: its rewritten cascade and kernel, or why it stays as it is."""

    site: Site
    cascade: Cascade | None = None
    kernel: Kernel | None = None
    block: int = 128
    refusal: Refusal | None = None
    backend: str = "auto"
    tables: Mapping[str, Table] = field(default_factory=dict)
    gates: tuple[Gate, ...] = ()

    @property
    def replacement(self) -> Replacement | None:
        """The splice to make, if any."""
        if self.kernel is None:
            return None
        return Replacement(self.site, self.kernel, self.tables, self.gates)


def find_attention(
    model: nn.Module | ExportedProgram,
    example_args: tuple[Any, ...] = (),
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
) -> Findings:
    """Every attention of ``model``, and every softmax that is not one, with the reason.

    The model is captured ahead of time with the example inputs.  Raises `CaptureError`.
    """
    captured = capture_model(
        model, tuple(example_args), example_kwargs, dynamic_shapes=dynamic_shapes
    )
    return find(canonicalize(captured.graph))


def optimize(
    model: nn.Module | ExportedProgram,
    policy: str | Policy = "exact",
    example_args: tuple[Any, ...] = (),
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    backend: str = "auto",
    budget: str | Budget | None = None,
    calibration: Any = None,
    verify: bool = True,
    plan: Plan | None = None,
) -> OptimizedModule:
    """Rewrite the attention of ``model`` as ``policy`` says, verify it, and return a module like
    it.

    ``model`` is a module, or an exported program, whose own example inputs are used when none are
    given.  ``policy`` is a pipeline as text, the path of a ``.toml`` file or a `Policy`; ``plan``
    replays an earlier one instead.  ``budget`` bounds the approximation error
    (``"cosine>=0.999"``).  With ``verify`` every site is measured on the example inputs against a
    float64 oracle: over the implementation bound is `VerifyError`, over the budget sends the site
    back to exact.  ``calibration`` (a mapping of arguments to tensors, a list of calls, or a
    `Calibration`) chooses the orders and blocks of `paro`, and a quantising scheme for each head.
    Without example inputs the first call of a module captures, just in time.
    """
    policy = Policy.of(policy)
    _check_options(backend, calibration, policy, plan, bool(example_args or example_kwargs))
    if budget is not None:
        policy = Policy(policy.rules, budget)
    if isinstance(model, nn.Module) and not example_args and not example_kwargs:
        from attn_rewrite.compile_backend import compiled

        return compiled(model, policy, backend=backend)
    watch = Stopwatch()
    with watch.stage("capture"):
        captured = capture_model(
            model, tuple(example_args), example_kwargs, dynamic_shapes=dynamic_shapes
        )
    if not isinstance(model, nn.Module):  # a program is fixed to its device and dtype
        return optimize_captured(
            captured, policy, watch, plan=plan, verify=verify, source=None, rebuild=None,
            backend=backend, calibration=calibration,
        )  # fmt: skip
    rebuild = partial(
        _again, captured=captured, policy=policy, dynamic_shapes=dynamic_shapes, plan=plan,
        backend=backend, calibration=calibration,
    )  # fmt: skip
    return optimize_captured(
        captured, policy, watch, plan=plan, verify=verify, source=model, rebuild=rebuild,
        backend=backend, calibration=calibration,
    )  # fmt: skip


def _check_options(
    backend: str, calibration: Any, policy: Policy, plan: Plan | None, ahead: bool
) -> None:
    from attn_rewrite.calibration import needs_calibration

    check_backend(backend)
    if calibration is None and plan is None and needs_calibration(policy):
        raise PolicyError("calibrated and paro choose by measuring; give calibration inputs")
    if calibration is not None and plan is not None:
        raise PolicyError("calibration and a plan were both given; a plan has chosen already")
    if calibration is not None and not ahead:
        raise PolicyError("calibration needs example inputs: the model is captured ahead of time")


def decide(
    findings: Findings,
    policy: Policy,
    plan: Plan | None,
    watch: Stopwatch,
    backend: str = "auto",
) -> tuple[Plan, list[Decision]]:
    """Plan, rewrite and lower every site; what is made of each is dumped."""
    dump = watch.dumper.write
    for site in findings.sites:
        dump(f"found-{site.name}", partial(str, site.cascade), suffix=".cascade", of=site.name)
    with watch.stage("plan"):
        if plan is None:
            plan = make_plan(findings, policy)
        else:
            check_sites(plan, findings)
    with watch.stage("rewrite"):
        decisions = [_decide(site, plan, backend) for site in findings.sites]
    dump("plan", plan.dumps(), suffix=".json")
    for item in decisions:
        name = item.site.name
        if item.cascade is not None and item.cascade is not item.site.cascade:
            dump(f"rewritten-{name}", partial(str, item.cascade), suffix=".cascade", of=name)
        if item.kernel is not None:
            dump(f"kernel-{name}", partial(getattr, item.kernel, "source"), suffix=".py", of=name)
    return plan, decisions


def _decide(site: Site, plan: Plan, backend: str) -> Decision:
    steps = plan.of(site.name)
    if not steps or all(s.keeps for s in steps):
        return Decision(site)
    cascade = rewritten(site, *steps)
    if isinstance(cascade, Refusal):
        return Decision(site, refusal=cascade)
    tables = plan.tables_of(site, cascade)
    if isinstance(tables, Refusal):
        return Decision(site, refusal=tables)
    return replace(lowered(site, cascade, backend, tables), gates=gates_of(site, steps))


def lowered(
    site: Site,
    cascade: Cascade,
    backend: str = "auto",
    tables: Mapping[str, Table] | None = None,
) -> Decision:
    """Lower a cascade for the place of ``site``; ``tables`` are what it reads of the plan's."""
    held = tables or {}
    kernel, block = lower_site(site, cascade, backend, held)
    if isinstance(kernel, Refusal):
        refusal = replace(kernel, site=site.name, source=site.source)
        return Decision(site, cascade, refusal=refusal, backend=backend)
    return Decision(site, cascade, kernel, block, backend=backend, tables=held)


def replacements(decisions: list[Decision]) -> list[Replacement]:
    """The splices of all decisions that rewrite something."""
    return [r for d in decisions if (r := d.replacement) is not None]


def optimize_captured(
    captured: Captured,
    policy: Policy,
    watch: Stopwatch,
    *,
    plan: Plan | None,
    verify: bool,
    source: nn.Module | None,
    rebuild: Any,
    backend: str = "auto",
    calibration: Any = None,
) -> OptimizedModule:
    """`optimize` from the captured graph on."""
    from attn_rewrite.accept import accept
    from attn_rewrite.optimized import OptimizedModule
    from attn_rewrite.reexport import export_again

    dump = watch.dumper.write
    dump("capture", lambda: graph_text(captured.graph), suffix=".fx")
    with watch.stage("canonicalize"):
        host = canonicalize(captured.graph)
    dump("canonicalize", lambda: graph_text(host), suffix=".fx")
    with watch.stage("find"):
        findings = find(host)
    if calibration is not None:
        plan = _calibrated(captured, host, findings, policy, watch, calibration, source)
    plan, decisions = decide(findings, policy, plan, watch, backend)
    outcome = accept(captured, host, findings, plan, decisions, policy.budget, watch, verify=verify)
    graph = outcome.graph
    knobs.tell(2, lambda: "\n".join(["refusals", *map(str, outcome.report.all_refusals())]))
    dump("spliced", lambda: graph_text(graph), suffix=".fx")
    return OptimizedModule(
        graph,
        plan=outcome.plan,
        report=outcome.report,
        sites=findings.sites,
        source=source,
        rebuild=rebuild,
        program=partial(export_again, original=captured.program),
        form=None if source is None else CallForm.of(source, captured.args, captured.kwargs),
    )


def _calibrated(
    captured: Captured,
    host: fx.GraphModule,
    findings: Findings,
    policy: Policy,
    watch: Stopwatch,
    calibration: Any,
    source: nn.Module | None,
) -> Plan:
    """The plan of ``policy`` with orders, blocks and schemes chosen for each head."""
    from attn_rewrite.block_calibration import calibrated_blocks
    from attn_rewrite.calibration import Calibration, calibrated_plan, calls_of, tentative

    given = Calibration.of(calibration)
    with watch.stage("calibrate"):
        plan = make_plan(findings, tentative(policy))
        quantised = any(isinstance(t, Quantisation) for s in plan.steps for t in s.transforms)
        calls = calls_of(given.inputs, captured, source, least=2 if quantised else 1)
        state = None if given.state is None else Path(given.state)
        plan = calibrated_blocks(host, findings, plan, calls, state=state, progress=given.progress)
        bound = None if policy.budget is None else policy.budget.site
        return calibrated_plan(host, findings, plan, calls, bound) if quantised else plan


def graph_text(graph: fx.GraphModule) -> str:
    """A graph and the graphs it calls, as text."""
    from attn_rewrite.passes.find import graphs

    return "\n\n".join(str(g.graph) for g in graphs(graph))


@dataclass(frozen=True, eq=False)
class Spliced:
    """A rewritten graph, and the gathers of reordered tokens: at the Sites, and as they are now."""

    graph: fx.GraphModule
    before: Gathers
    after: Gathers


def spliced(captured: Captured, decisions: list[Decision]) -> Spliced:
    """The host graph with every lowered site in place."""
    graph = splice(captured.graph, replacements(decisions))
    if graph is captured.graph:
        return Spliced(graph, Gathers(), Gathers())
    before, after = settle(graph)
    folded = any(d.kernel is not None and d.kernel.name == "triton" for d in decisions)
    return Spliced(graph, before, fold_into_kernels(graph) if before.total and folded else after)


def _again(
    source: nn.Module,
    *,
    captured: Captured,
    policy: Policy,
    dynamic_shapes: Any,
    plan: Plan | None,
    backend: str,
    calibration: Any,
    cached: bool = False,
    packed: bool = False,
    made: Plan | None = None,
) -> Any:
    """Capture and rewrite a source that moved: example inputs follow its device and dtype.

    ``cached``: a step with a past instead, lowered for ONNX, which has no other use for it;
    ``packed``: such a step as a `PackedDecoder`.  Behind an encoder a step does what was planned
    (``made``) of the attentions that it has.
    """
    from torch.utils import _pytree as pytree

    probe = next(t for t in (*source.parameters(), *source.buffers()) if t.is_floating_point())

    def follow(value: Any) -> Any:
        if not hasattr(value, "is_floating_point"):
            return value
        return (
            value.to(probe.device, probe.dtype)
            if value.is_floating_point()
            else value.to(probe.device)
        )

    from attn_rewrite.calibration import Calibration

    if calibration is not None:
        given = Calibration.of(calibration)
        calibration = replace(given, inputs=pytree.tree_map(follow, given.inputs))
    args, kwargs = pytree.tree_map(follow, (captured.args, captured.kwargs))
    if packed:
        if backend not in ("auto", "torch"):
            raise PolicyError(
                f"a packed cache runs on torch operators, but backend={backend!r} was asked for; "
                "optimize the model with backend='torch' or 'auto'"
            )
        return _packed(source, policy, plan, args, kwargs)
    if cached:
        from attn_rewrite.decoding import capture_step
        from attn_rewrite.encoded import has_encoder

        watch = Stopwatch()
        with watch.stage("capture"):
            later = capture_step(source, args, kwargs)
        if made is not None and has_encoder(source):
            plan = made.among({s.name for s in find(canonicalize(later.graph)).sites})
        return optimize_captured(
            later, policy, watch, plan=plan, verify=True, source=None, rebuild=None, backend="onnx",
        )  # fmt: skip
    return optimize(
        source, policy, args, kwargs, dynamic_shapes=dynamic_shapes, plan=plan, backend=backend,
        calibration=calibration,
    )  # fmt: skip


def _packed(
    source: nn.Module, policy: Policy, plan: Plan | None, args: Any, kwargs: Any
) -> PackedDecoder:
    """A later step of ``source`` with its cache in few bits."""
    from attn_rewrite.decoding import capture_step
    from attn_rewrite.encoded import has_encoder
    from attn_rewrite.packed_decoder import packed_decoder

    if has_encoder(source):
        raise PolicyError(
            f"{type(source).__name__} has no packed cache: its decoder stands behind an encoder, "
            "and only decoders alone are packed; use the model without one"
        )
    step = capture_step(source, args, kwargs)
    findings = find(canonicalize(step.graph))
    return packed_decoder(step, findings, plan or make_plan(findings, policy), source)
