"""``attn-rewrite inspect``: every attention of a model, and every near miss with its reason."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from attn_rewrite.cli.options import Model, ModelOptions
from attn_rewrite.cli.terminal import Terminal

if TYPE_CHECKING:
    from rich.console import Console

    from attn_rewrite.site import Findings, Refusal, Site


def inspect(model: Model, options: ModelOptions, terminal: Terminal) -> int:
    """Show every attention found in MODEL, and what was not recognised and why."""
    from attn_rewrite.cli.app import DONE

    loaded = options.load(model, terminal)
    with terminal.stage("capturing the graph and finding attention"):
        from attn_rewrite.driver import find_attention

        findings = find_attention(
            loaded.subject, loaded.args, loaded.kwargs, dynamic_shapes=loaded.dynamic_shapes
        )
    if not findings.sites:
        return no_sites(terminal, model, findings)
    document = {
        "model": model,
        "sites": [site_document(site) for site in findings.sites],
        "refusals": [refusal.to_json() for refusal in findings.refusals],
        "notes": list(loaded.notes),
    }
    terminal.show(document, lambda console: _view(console, model, findings))
    return DONE


def no_sites(terminal: Terminal, model: str, findings: Findings) -> int:
    """Show the near misses of a model without attention; exit code 1."""
    from attn_rewrite.cli.app import NOTHING_DONE

    refusals = [refusal.to_json() for refusal in findings.refusals]
    document = {"model": model, "sites": [], "refusals": refusals, "notes": []}
    terminal.show(document, lambda console: _view(console, model, findings))
    return NOTHING_DONE


def site_document(site: Site) -> dict[str, Any]:
    """Facts of a Site as plain values."""
    return {
        "name": site.name,
        "module": site.module,
        "rewritable": site.rewritable,
        **site.facts(),
        "source": site.source,
        "refusals": [refusal.to_json() for refusal in site.refusals],
    }


def _view(console: Console, model: str, findings: Findings) -> None:
    sites = findings.sites
    if sites:
        _sites(console, sites)
    ready = sum(site.rewritable for site in sites)
    noun = "site" if len(sites) == 1 else "sites"
    console.print(f"{len(sites)} attention {noun} in {model}, {ready} rewritable", markup=False)
    reasons = [(site.name, refusal) for site in sites for refusal in site.refusals]
    if reasons:
        refusal_table(console, reasons, title="recognised, but not rewritable")
    if findings.refusals:
        rows = [(refusal.site or refusal.node, refusal) for refusal in findings.refusals]
        refusal_table(console, rows, title="near misses")


def _sites(console: Console, sites: Sequence[Site]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(
        "site", "kind", "family", "causal", "heads", "q x kv", "d", "layout", "rope", "ok"
    )
    table.columns[0].overflow = "fold"
    for site in sites:
        heads = str(site.hq) if site.hq == site.hkv else f"{site.hq}/{site.hkv}"
        width = str(site.d_qk) if site.d_qk == site.d_v else f"{site.d_qk}/{site.d_v}"
        cells = (
            site.name,
            site.kind,
            site.family,
            _yes(site.causal),
            heads,
            f"{site.q_len} x {site.kv_len}",
            width,
            site.layout,
            _yes(site.rope),
            _yes(site.rewritable),
        )
        table.add_row(*map(Text, cells))
    console.print(table)


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def refusal_table(console: Console, rows: Sequence[tuple[str, Refusal]], *, title: str) -> None:
    """Print refusals: what each is about, its code, sentence and source line."""
    from rich.table import Table
    from rich.text import Text

    table = Table("where", "code", "reason", "source", title=title)
    for column in table.columns:
        column.overflow = "fold"
    for where, refusal in rows:
        table.add_row(*map(Text, (where, refusal.code, refusal.reason, refusal.source or "")))
    console.print(table)
