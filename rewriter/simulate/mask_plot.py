"""A picture of a mask: the share of kept pairs, and which blocks are empty, partial or full."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from attn_rewrite.cascade.counting import block_pairs
from attn_rewrite.cascade.cover import block_cover
from attn_rewrite.cascade.expr import Const, Expr, Extent, H, substitute
from attn_rewrite.errors import PolicyError, ToolError
from attn_rewrite.simulate.mask import mask_of
from attn_rewrite.token_layout import TokenLayout

# Pixels per side: beyond it a pixel is the share of the pairs it stands for.
_PIXELS = 1024
_COLOURS = ("#f4f4f4", "#f0b35c", "#28527a")  # empty, partial, full


def plot_mask(
    policy: str,
    layout: TokenLayout,
    path: Path,
    *,
    block: int = 128,
    heads: int = 1,
    head: int = 0,
    causal: bool = False,
) -> dict[str, Any]:
    """Draw the mask of ``policy`` for one head into ``path`` (png, pdf or svg by its ending).

    Returns the blocks drawn (``empty``, ``partial``, ``full``).  `PolicyError` for a policy that is
    refused or an unknown ending, `ToolError` where the file cannot be written.
    """
    if path.suffix not in (".png", ".pdf", ".svg"):
        raise PolicyError(f"a picture ends in .png, .pdf or .svg, not {path.name!r}")
    mask = mask_of(policy, layout, heads=heads, causal=causal)
    cells = block_cover(
        mask, q_len=layout.q_len, kv_len=layout.kv_len, block_q=block, block_kv=block,
        head=head, extents={"h": heads},
    )  # fmt: skip
    share = _shares(mask, layout, head, heads)
    title = f"{policy} on {layout}" + (f", head {head}" if heads > 1 else "")
    _draw(share, cells, title, block, path)
    names = ("empty", "partial", "full")
    return {name: int((cells == value).sum()) for value, name in enumerate(names)}


def _shares(mask: Expr, layout: TokenLayout, head: int, heads: int) -> npt.NDArray[np.float64]:
    """The share of kept pairs of each pixel; by cover (0, a half, 1) where they have no count."""
    pixel = max(1, -(-max(layout.q_len, layout.kv_len) // _PIXELS))
    literals: dict[Expr, Expr] = {H: Const(head), Extent("h"): Const(heads)}
    literals |= {Extent("q"): Const(layout.q_len), Extent("kv"): Const(layout.kv_len)}
    count, keys = layout.q_len, layout.kv_len
    pairs = block_pairs(
        substitute(mask, literals), q_len=count, kv_len=keys, block_q=pixel, block_kv=pixel
    )
    if pairs is None:
        cover = block_cover(
            mask, q_len=count, kv_len=keys, block_q=pixel, block_kv=pixel, head=head,
            extents={"h": heads},
        )  # fmt: skip
        return cover / 2.0
    sides = [
        np.minimum(np.arange(0, n, pixel) + pixel, n) - np.arange(0, n, pixel)
        for n in (layout.q_len, layout.kv_len)
    ]
    return np.asarray(pairs / np.outer(*sides), dtype=np.float64)


def _draw(
    share: npt.NDArray[np.float64], cells: npt.NDArray[np.int8], title: str, block: int, path: Path
) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    figure = Figure(figsize=(11, 5.6), layout="constrained")
    FigureCanvasAgg(figure)
    pairs, blocks = figure.subplots(1, 2)
    pairs.imshow(share, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    pairs.set_title("share of kept pairs")
    blocks.imshow(cells, cmap=ListedColormap(_COLOURS), vmin=0, vmax=2, interpolation="nearest")
    blocks.set_title(f"blocks of {block}")
    names = ("empty", "partial", "full")
    blocks.legend(
        handles=[Patch(color=c, label=n) for c, n in zip(_COLOURS, names, strict=True)],
        loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=3, frameon=False,
    )  # fmt: skip
    for axes in (pairs, blocks):
        axes.set_xlabel("keys")
        axes.set_ylabel("queries")
    figure.suptitle(title)
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise ToolError(f"{path} cannot be written: {error}", stage="plot") from error
