"""``attn-rewrite cascade``: a cascade of Einsums, its passes, and its reductions fused."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from attn_rewrite.cli.terminal import Terminal

if TYPE_CHECKING:
    from rich.console import Console

    from attn_rewrite.cascade import Cascade
    from attn_rewrite.cascade.count import PassAnalysis


@dataclass(frozen=True)
class CascadeOptions:
    """What is asked about a cascade."""

    fuse: Annotated[
        str | None, typer.Option(metavar="RANK", help="Fuse the reductions over RANK.")
    ] = None
    count: Annotated[
        str | None, typer.Option(metavar="RANK", help="Count passes over RANK (default kv).")
    ] = None
    svg: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the cascade into FILE.")
    ] = None
    diff: Annotated[
        str | None,
        typer.Option(metavar="NAME|FILE", help="What changes from the cascade to this one."),
    ] = None


def cascade(
    terminal: Terminal,
    options: CascadeOptions,
    name: Annotated[
        str | None, typer.Argument(metavar="NAME|FILE", help="Leave it out to list the names.")
    ] = None,
) -> int:
    """Print a cascade, count its passes over a rank, fuse its reductions, draw it."""
    from attn_rewrite.cascade import NAMED

    if name is None:
        names = {key: value.name for key, value in NAMED.items()}
        terminal.show({"cascades": list(names)}, lambda console: console.print("\n".join(names)))
        return 0
    before = read(name)
    if options.diff is not None:
        return _diff(terminal, options, before, read(options.diff))
    after, proofs, left, refused = _fuse(before, options.fuse)
    given = None if options.fuse is None else _analysis(before, options.fuse)
    analysis = _analysis(after, options.count or options.fuse)
    if options.svg is not None:
        _draw(after, None if analysis is None else analysis.rank, options.svg)
    document = {
        "name": before.name,
        "before": None if given is None else {"cascade": str(before), **analysis_document(given)},
        "cascade": str(after),
        "passes": None if analysis is None else analysis_document(analysis),
        "proofs": proofs,
        "left": left,
        "refusal": refused,
        "svg": None if options.svg is None else str(options.svg),
    }
    terminal.show(document, lambda console: _view(console, document))
    return 0 if refused is None else 1


def _diff(terminal: Terminal, options: CascadeOptions, before: Cascade, after: Cascade) -> int:
    """Compare two cascades up to names and order."""
    from attn_rewrite.cascade import diff, equivalent
    from attn_rewrite.errors import PolicyError

    others = {"--fuse": options.fuse, "--count": options.count, "--svg": options.svg}
    clash = [name for name, value in others.items() if value is not None]
    if clash:
        raise PolicyError(f"--diff compares two cascades as they are; leave out {clash[0]}")
    text, same = diff(before, after), equivalent(before, after)
    document = {"name": before.name, "other": after.name, "equivalent": same, "diff": text}
    shown = text or "the cascades are equal"
    terminal.show(document, lambda console: console.print(shown, markup=False, soft_wrap=True))
    return 0


def read(name: str) -> Cascade:
    """The named cascade, or the one written in a file."""
    from attn_rewrite.budget import suggest
    from attn_rewrite.cascade import NAMED, parse
    from attn_rewrite.errors import PolicyError

    if name in NAMED:
        return NAMED[name]
    path = Path(name)
    if not path.is_file():
        raise PolicyError(f"no cascade or file is called {name!r}{suggest(name, NAMED)}")
    try:
        return parse(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise PolicyError(f"the cascade file {name} cannot be read: {error}") from error
    except ValueError as error:
        raise PolicyError(f"{name} is not a cascade: {error}") from error


def _fuse(
    cascade: Cascade, rank: str | None
) -> tuple[Cascade, list[str], list[dict[str, Any]], dict[str, Any] | None]:
    """(cascade, proofs, what could not be fused, why nothing was); unchanged without a rank."""
    from attn_rewrite.passes.cascade import fuse_reductions
    from attn_rewrite.site import Refusal

    if rank is None:
        return cascade, [], [], None
    fused = fuse_reductions(cascade, resolved(cascade, rank))
    if isinstance(fused, Refusal):
        return cascade, [], [], fused.to_json()
    proofs = [str(proof) for proof in fused.proofs]
    return fused.cascade, proofs, [r.to_json() for r in fused.refusals], None


def fusion_document(cascade: Cascade, rank: str) -> dict[str, Any]:
    """What `fuse_reductions` makes of a cascade: passes, proofs, refusals, as plain values.

    ``passes`` is None where nothing was fused.
    """
    from attn_rewrite.passes.cascade import fuse_reductions
    from attn_rewrite.site import Refusal

    fused = fuse_reductions(cascade, rank)
    if isinstance(fused, Refusal):
        return {"passes": None, "proofs": [], "refusals": [fused.to_json()]}
    return {
        "passes": fused.passes,
        "proofs": [str(proof) for proof in fused.proofs],
        "refusals": [refusal.to_json() for refusal in fused.refusals],
    }


def resolved(cascade: Cascade, rank: str) -> str:
    """``rank`` or what it is an alias of; `PolicyError` when the cascade has no such rank."""
    from attn_rewrite.errors import PolicyError

    try:
        return cascade.rank(rank)
    except ValueError as error:
        raise PolicyError(str(error)) from error


def _analysis(cascade: Cascade, rank: str | None) -> PassAnalysis | None:
    from attn_rewrite.cascade import pass_analysis

    if rank is not None:
        return pass_analysis(cascade, resolved(cascade, rank))
    known = {r.name for r in cascade.ranks}
    default = next((r for r in ("kv", "m") if r in known), None)
    return None if default is None else pass_analysis(cascade, default)


def analysis_document(analysis: PassAnalysis) -> dict[str, Any]:
    """Passes, live tensors and barriers as plain values."""
    return {
        "rank": analysis.rank,
        "passes": analysis.passes,
        "live": list(analysis.live),
        "barriers": [list(barrier) for barrier in analysis.barriers],
        "tensor_passes": dict(analysis.tensor_passes),
    }


def _draw(cascade: Cascade, rank: str | None, path: Path) -> None:
    from attn_rewrite.cascade.picture import to_svg
    from attn_rewrite.errors import ToolError

    try:
        path.write_text(to_svg(cascade, rank), encoding="utf-8")
    except OSError as error:
        reason = error.strerror or str(error)
        raise ToolError(
            f"the drawing cannot be written to {path}: {reason}", stage="svg"
        ) from error


def _view(console: Console, document: dict[str, Any]) -> None:
    """The derivation from top to bottom: what was given, each rule with its proof, the result."""
    given, passes = document["before"], document["passes"]
    if given is not None and document["refusal"] is None:
        _view_cascade(console, given["cascade"], given)
        for number, proof in enumerate(document["proofs"], 1):
            console.print(f"\n{number}. {proof}", markup=False, soft_wrap=True)
        console.print(
            f"\n{_passes(given['passes'])} -> {_passes(passes['passes'])} over {passes['rank']}\n",
            markup=False,
        )
    _view_cascade(console, document["cascade"], passes)
    for refusal in document["left"]:
        console.print(
            f"left: [{refusal['code']}] {refusal['reason']}", markup=False, soft_wrap=True
        )
    if document["refusal"] is not None:
        refusal = document["refusal"]
        console.print(
            f"not fused: [{refusal['code']}] {refusal['reason']}", markup=False, soft_wrap=True
        )
    if document["svg"] is not None:
        console.print(f"drawn in {document['svg']}", markup=False)


def _view_cascade(console: Console, text: str, passes: dict[str, Any] | None) -> None:
    console.print(text, markup=False, soft_wrap=True)
    if passes is None:
        return
    live = ", ".join(passes["live"]) or "nothing"
    console.print(
        f"{_passes(passes['passes'])} over {passes['rank']}; live for a whole fiber: {live}",
        markup=False,
    )
    for value, waits in passes["barriers"]:
        console.print(f"  {waits} waits for all of {value}", markup=False)


def _passes(count: int) -> str:
    return "1 pass" if count == 1 else f"{count} passes"
