"""``attn-rewrite explain``: one Site before and after a policy, and which rules fit it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from attn_rewrite.cli.cascade import analysis_document, fusion_document
from attn_rewrite.cli.inspect import no_sites, site_document
from attn_rewrite.cli.options import Model, ModelOptions
from attn_rewrite.cli.terminal import Terminal

if TYPE_CHECKING:
    from rich.console import Console

    from attn_rewrite.backends.torch.schedule import TileCounts
    from attn_rewrite.cascade import Cascade
    from attn_rewrite.driver import Decision
    from attn_rewrite.passes.transform import Transform
    from attn_rewrite.policy import Policy
    from attn_rewrite.site import Findings, Refusal, Site


@dataclass(frozen=True)
class Question:
    """What is asked about the Site."""

    site: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="A Site that inspect lists.", show_default=False),
    ] = None
    policy: Annotated[
        str,
        typer.Option(metavar="P", help="A pipeline such as 'window(size=64)', or a .toml file."),
    ] = "exact"
    why_not: Annotated[
        str | None, typer.Option(metavar="RULE", help="Only this transform: why it does not apply.")
    ] = None


def explain(model: Model, question: Question, options: ModelOptions, terminal: Terminal) -> int:
    """Show a Site's cascade before and after a policy, its cost, and refusals per rule."""
    from attn_rewrite.cli.policy import read_policy

    policy = read_policy(question.policy)
    asked = None if question.why_not is None else read_policy(question.why_not)
    loaded = options.load(model, terminal)
    with terminal.stage("capturing the graph and finding attention"):
        from attn_rewrite.driver import find_attention

        findings = find_attention(
            loaded.subject, loaded.args, loaded.kwargs, dynamic_shapes=loaded.dynamic_shapes
        )
    if not findings.sites:
        return no_sites(terminal, model, findings)
    site = _chosen(findings, question.site)
    if asked is not None:
        verdicts = _verdicts(site, asked)
        answer = {"site": site.name, "verdicts": verdicts}
        terminal.show(answer, lambda console: _view_verdicts(console, verdicts))
        return 0
    document = _document(findings, site, policy, options)
    terminal.show(document, lambda console: _view(console, document))
    return 0


def _chosen(findings: Findings, name: str | None) -> Site:
    from attn_rewrite.budget import suggest
    from attn_rewrite.errors import PolicyError
    from attn_rewrite.policy import glob_matches

    names = [site.name for site in findings.sites]
    if name is None and len(names) != 1:
        raise PolicyError(
            f"the model has {len(names)} sites; name one with --site{suggest('', names)}"
        )
    if name is None:
        return findings.sites[0]
    # A layer glob or a module path will do where it means one Site only.
    meant = [s for s in findings.sites if s.name == name]
    meant = meant or [s for s in findings.sites if glob_matches(name, s)]
    if not meant:
        raise PolicyError(f"the model has no site {name!r}{suggest(name, names)}")
    if len(meant) > 1:
        raise PolicyError(f"--site {name!r} means {len(meant)} sites{suggest(name, names)}")
    return meant[0]


def _document(
    findings: Findings, site: Site, policy: Policy, options: ModelOptions
) -> dict[str, Any]:
    from attn_rewrite.driver import lowered
    from attn_rewrite.plan import make_plan, rewritten
    from attn_rewrite.site import Refusal

    plan = make_plan(findings, policy)
    steps = plan.of(site.name)
    after = rewritten(site, *steps)
    refusals = [r for r in plan.refusals if r.site == site.name]
    if isinstance(after, Refusal):
        after = site.cascade
    extents, decision = _extents(site, options.length), lowered(site, after)
    before = _cascade(lowered(site, site.cascade), extents, options, decision.block)
    return {
        "site": site_document(site),
        "policy": str(policy),
        "steps": [str(step) for step in steps],
        "extents": extents,
        "before": before,
        "after": _cascade(decision, extents, options, decision.block),
        "changed": after != site.cascade,
        "refusals": [refusal.to_json() for refusal in refusals],
        "rules": _verdicts(site, None),
    }


def _extents(site: Site, length: int | None) -> dict[str, int]:
    """The size of each rank: what is dynamic is taken at ``--length``, else as captured."""
    from attn_rewrite.costs import hint

    sizes = {"b": 1, **site.extents()}
    known = {rank.name for rank in site.cascade.ranks}
    return {
        rank: size if isinstance(size, int) else length or hint(size)
        for rank, size in sizes.items()
        if rank in known
    }


def _cascade(
    decision: Decision, extents: dict[str, int], options: ModelOptions, block: int
) -> dict[str, Any]:
    """A cascade with its passes, kernel and cost; tiles are of side ``block`` before and after."""
    from attn_rewrite.cascade import pass_analysis
    from attn_rewrite.cascade.lse import with_lse

    cascade = decision.cascade or decision.site.cascade
    tiles = _tiles(decision.site, cascade, extents, block)
    kernel, refusal = decision.kernel, decision.refusal
    if kernel is not None:
        lowering = {"name": kernel.name, "why": kernel.why}
    else:
        lowering = {"name": "none", "why": str(refusal)}
    return {
        "cascade": str(cascade if decision.site.lse is None else with_lse(cascade)),
        "passes": analysis_document(pass_analysis(cascade, "kv")),
        "fusion": fusion_document(cascade, "kv"),
        "kernel": lowering,
        "tiles": {"executed": tiles.executed, "total": tiles.total, "block": block},
        "cost": _cost(cascade, extents, options, tiles.density),
    }


def _tiles(site: Site, cascade: Cascade, extents: dict[str, int], block: int) -> TileCounts:
    """Tiles that the guards leave, over all heads of one batch entry."""
    from attn_rewrite.backends.torch.schedule import make_schedule
    from attn_rewrite.cascade.expr import conjunction

    return make_schedule(
        conjunction(cascade.guard_terms()),
        q_len=extents["q"],
        kv_len=extents["kv"],
        block=block,
        heads=site.hq,
        group=site.hq // site.hkv,
    ).counts()


def _cost(
    cascade: Cascade, extents: dict[str, int], options: ModelOptions, fraction: float
) -> dict[str, Any]:
    from attn_rewrite.cascade.cost import site_cost
    from attn_rewrite.target import for_device

    dtype = "float32" if options.dtype is None else options.dtype.value
    target = for_device(options.device or "cpu")
    return site_cost(cascade, extents, target, dtype=dtype, tile_fraction=fraction).to_json()


def _verdicts(site: Site, policy: Policy | None) -> list[dict[str, Any]]:
    """Whether each transform applies: those of ``policy``, or all there are."""
    if policy is None:
        return [_verdict(site, transform, ()) for transform in _samples()]
    return [_verdict(site, t, rule.where.kind) for rule in policy.rules for t in rule.apply]


def _samples() -> list[Transform]:
    """One of each transform, with as few options given as it accepts."""
    from attn_rewrite.passes import TRANSFORMS

    return [made for kind in TRANSFORMS.values() if (made := _sample(kind)) is not None]


def _sample(kind: type[Transform]) -> Transform | None:
    from attn_rewrite.passes.transform import field_infos

    smallest = {f.name: f.option.minimum for f in field_infos(kind) if f.option.minimum is not None}
    for options in ({}, *({name: value} for name, value in smallest.items()), smallest):
        try:
            return kind(**options)
        except (TypeError, ValueError):  # an option is missing: try with more of them
            continue
    return None


def _verdict(site: Site, transform: Transform, kinds: tuple[str, ...]) -> dict[str, Any]:
    refusal = _refusal(site, transform, kinds)
    return {
        "rule": transform.name,
        "as": str(transform),
        "applies": refusal is None,
        "refusal": None if refusal is None else refusal.to_json(),
    }


def _refusal(site: Site, transform: Transform, kinds: tuple[str, ...]) -> Refusal | None:
    """The first condition that failed."""
    from attn_rewrite.site import Refusal

    if site.refusals and transform.name != "keep":
        return site.refusals[0]
    refused = transform.admits(site, kinds)
    if refused is not None:
        return refused
    result = transform.apply(site.cascade, site)
    return result if isinstance(result, Refusal) else None


def _view(console: Console, document: dict[str, Any]) -> None:
    site = document["site"]
    facts = ("kind", "family", "causal", "hq", "hkv", "q_len", "kv_len", "d_qk", "d_v", "layout")
    console.print(site["name"], style="bold", markup=False)
    console.print(", ".join(f"{name}={site[name]}" for name in facts), markup=False)
    if site["source"]:
        console.print(f"from {site['source']}", markup=False)
    _view_cascade(console, "before", document["before"])
    for step in document["steps"]:
        console.print(f"\nstep  {step}", markup=False)
    if document["changed"]:
        _view_cascade(console, "after", document["after"], document["before"])
    else:
        console.print(f"\nunder {document['policy']} the cascade stays as it is", markup=False)
    for refusal in document["refusals"]:
        console.print(f"refused: [{refusal['code']}] {refusal['reason']}", markup=False)
    _view_costs(console, document)
    _view_verdicts(console, document["rules"])


def _view_cascade(
    console: Console, title: str, part: dict[str, Any], earlier: dict[str, Any] | None = None
) -> None:
    """A cascade and its passes; the derivation only where it is not that of ``earlier``."""
    passes = part["passes"]
    live = ", ".join(passes["live"]) or "nothing"
    console.print(f"\n{title}:", style="bold")
    console.print(part["cascade"], markup=False, soft_wrap=True)
    console.print(f"{passes['passes']} passes over {passes['rank']}; live: {live}", markup=False)
    if earlier is not None and earlier["fusion"] == part["fusion"]:
        console.print("derived as before", markup=False)
    else:
        _view_fusion(console, part["fusion"], passes)
    console.print(f"kernel {part['kernel']['name']}: {part['kernel']['why']}", markup=False)


def _view_fusion(console: Console, fusion: dict[str, Any], passes: dict[str, Any]) -> None:
    """How few passes there need be: the proof of every rule applied, and the reason of the rest."""
    if fusion["passes"] is not None and fusion["passes"] < passes["passes"]:
        console.print(f"derived: {passes['passes']} -> {fusion['passes']} passes", markup=False)
    for number, proof in enumerate(fusion["proofs"], 1):
        console.print(f"{number}. {proof}", markup=False, soft_wrap=True)
    for refusal in fusion["refusals"]:
        text = f"not fused: [{refusal['code']}] {refusal['reason']}"
        console.print(text, markup=False, soft_wrap=True)


def _view_costs(console: Console, document: dict[str, Any]) -> None:
    from rich.table import Table

    parts = (document["before"], document["after"])
    sizes = ", ".join(f"{rank}={size}" for rank, size in document["extents"].items())
    console.print(f"\nlower bounds on {parts[0]['cost']['target']} at {sizes}", markup=False)
    table = Table("", "before", "after")
    tiles = [f"{p['tiles']['executed']} of {p['tiles']['total']}" for p in parts]
    block = parts[1]["tiles"]["block"]
    table.add_row(f"tiles of {block} x {block}", *tiles)
    for name in ("flops", "dram_bytes", "live_bytes", "kept", "bound", "time_s"):
        values = [part["cost"][name] for part in parts]
        table.add_row(name, *(f"{v:.4g}" if isinstance(v, float) else str(v) for v in values))
    console.print(table)


def _view_verdicts(console: Console, verdicts: list[dict[str, Any]]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table("rule", "applies", "why not")
    for verdict in verdicts:
        refusal = verdict["refusal"]
        why = "" if refusal is None else f"[{refusal['code']}] {refusal['reason']}"
        table.add_row(*map(Text, (verdict["as"], "yes" if verdict["applies"] else "no", why)))
    console.print(table)
