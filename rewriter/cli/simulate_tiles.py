"""``attn-rewrite simulate tiles`` and ``simulate mask``: tiles counted without running anything."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from attn_rewrite.cli.terminal import Terminal
from attn_rewrite.errors import PolicyError

if TYPE_CHECKING:
    from rich.console import Console

    from attn_rewrite.simulate.tiles import Result


@dataclass(frozen=True)
class TileOptions:
    """A neighborhood attention and its tiles; sizes are written 30x48x80."""

    grid: Annotated[str, typer.Option(help="Tokens per axis, one to three axes.")]
    window: Annotated[str | None, typer.Option(help="Keys per axis.")] = None
    stride: Annotated[str | None, typer.Option(help="Queries that share a window [1].")] = None
    tile_q: Annotated[str | None, typer.Option(help="Query tile.")] = None
    tile_kv: Annotated[str | None, typer.Option(help="Key tile.")] = None
    dilation: Annotated[str | None, typer.Option(help="Distance of keys per axis [1].")] = None
    causal: Annotated[str | None, typer.Option(help="Axes that see their past only, as 1x0x0.")] = (
        None
    )
    share: Annotated[
        float | None, typer.Option(help="Share of run time spent in attention, 0 to 1.")
    ] = None
    search: Annotated[
        bool, typer.Option("--search", help="Find strides and tiles with the best bound.")
    ] = False
    sparsity: Annotated[
        float | None, typer.Option(help="With --search: share of pairs left out.")
    ] = None


def tiles(terminal: Terminal, options: TileOptions) -> int:
    """Count the tiles neighborhood attention visits, and bound its speed-up.

    A stride above 1 approximates the model: --search finds candidates, it does not say that they
    are as good.
    """
    from attn_rewrite.simulate.tiles import Case, search, simulate

    grid = _sizes("--grid", options.grid)
    causal = tuple(bool(v) for v in _sizes("--causal", options.causal, grid, 0, minimum=0))
    if options.search:
        fixed = {"--stride": options.stride, "--tile-q": options.tile_q}
        fixed |= {"--tile-kv": options.tile_kv, "--dilation": options.dilation}
        given = [name for name, value in fixed.items() if value is not None]
        if given:
            raise PolicyError(f"--search chooses strides and tiles; leave out {', '.join(given)}")
        window = None if options.window is None else _sizes("--window", options.window, grid)
        found = search(
            grid, window=window, sparsity=options.sparsity, causal=causal, share=options.share
        )
        if not found:
            raise PolicyError("no window of whole tiles has that sparsity on this grid")
        documents = [{**r.to_json(), "approximation": _changes(r)} for r in found]
        terminal.show({"results": documents}, lambda console: _print(console, found))
        return 0
    if options.sparsity is not None:
        raise PolicyError("--sparsity belongs to --search; give --window instead")
    case = Case(
        grid,
        _sizes("--window", options.window, grid),
        _sizes("--stride", options.stride, grid, 1),
        _sizes("--tile-q", options.tile_q, grid),
        _sizes("--tile-kv", options.tile_kv, grid),
        _sizes("--dilation", options.dilation, grid, 1),
        causal,
    )
    result = simulate(case, options.share)
    document = {**result.to_json(), "approximation": _changes(result)}
    terminal.show(document, lambda console: _print(console, [result]))
    return 0


def _changes(result: Result) -> str | None:
    """What a stride does to the model."""
    if max(result.case.stride) == 1:
        return None
    return "a stride above 1 moves windows: it approximates neighborhood attention"


def _sizes(
    name: str,
    text: str | None,
    grid: Sequence[int] | None = None,
    default: int | None = None,
    minimum: int = 1,
) -> tuple[int, ...]:
    if text is None:
        if default is None or grid is None:
            raise PolicyError(f"give {name}, one number per axis as 18x24x24")
        return (default,) * len(grid)
    if not re.fullmatch(r"\d{1,9}(x\d{1,9}){0,2}", text):
        raise PolicyError(f"{name} is {text!r}; write one number per axis, as 18x24x24")
    values = tuple(int(v) for v in text.split("x"))
    if grid is not None and len(values) == 1:
        values = values * len(grid)
    if grid is not None and len(values) != len(grid):
        raise PolicyError(f"{name} has {len(values)} axes, but the grid has {len(grid)}")
    if min(values) < minimum:
        raise PolicyError(f"{name} is {text}; sizes are at least {minimum}")
    return values


def _print(console: Console, found: Sequence[Result]) -> None:
    from rich.table import Table

    names = ("window", "stride", "tile q", "tile kv", "visited", "of", "bound", "mean", "FLOPs")
    table = Table(*names, "full", "end to end", title="Key tiles of the worst query tile")
    for result in found:
        r = result.to_json()
        sizes = ("x".join(map(str, r[n])) for n in ("window", "stride", "tile_q", "tile_kv"))
        end = r["end_to_end_bound"]
        table.add_row(
            *sizes, str(r["visited_max"]), str(r["dense"]), f"{r['bound_max']:.2f}",
            f"{r['bound_mean']:.2f}", f"{r['flop_bound']:.2f}", f"{r['full_fraction']:.0%}",
            "" if end is None else f"{end:.2f}",
        )  # fmt: skip
    console.print(table)


@dataclass(frozen=True)
class MaskOptions:
    """The tokens a mask is counted on."""

    layout: Annotated[
        str, typer.Option(help="frames=18,tokens=3840, grid=30x48x80 or length=4096.")
    ]
    text: Annotated[int | None, typer.Option(min=0, help="Text tokens before the grid.")] = None
    block: Annotated[int, typer.Option(min=1, help="Side of a block.")] = 128
    heads: Annotated[int, typer.Option(min=1, help="Query heads.")] = 1
    causal: Annotated[bool, typer.Option("--causal", help="The attention is causal.")] = False

    def parsed(self) -> Any:
        """The `TokenLayout`."""
        from attn_rewrite.token_layout import TokenLayout

        text = self.layout if self.text is None else f"{self.layout},text={self.text}"
        return TokenLayout.parse(text)


def mask(
    terminal: Terminal,
    policy: Annotated[str, typer.Argument(metavar="POLICY", help="As radial(gamma=0.2).")],
    options: MaskOptions,
) -> int:
    """Count the blocks a policy keeps on a layout of tokens."""
    from attn_rewrite.simulate.mask import count_mask

    found = count_mask(
        policy,
        options.parsed(),
        block=options.block,
        heads=options.heads,
        causal=options.causal,
    ).to_json()

    def view(console: Console) -> None:
        kept, total = found["blocks_kept"], found["blocks_total"]
        console.print(
            f"{kept:,} of {total:,} blocks kept ({found['block_density']:.5f}), "
            f"{found['blocks_full']:,} of them whole"
        )
        density = found["element_density"]
        console.print("pairs not counted" if density is None else f"{density:.6f} of the pairs")

    terminal.show(found, view)
    return 0
