"""The simulator of tiles: published cases, enumeration, and the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attn_rewrite.cli.app import run
from attn_rewrite.simulate.tiles import Case, amdahl, search, simulate
from tests.command import attn_rewrite

HUNYUAN, FLUX, COSMOS = (30, 48, 80), (256, 256), (16, 44, 80)
B200 = {HUNYUAN: ((4, 8, 8), (2, 8, 8)), FLUX: ((16, 16), (16, 8)), COSMOS: ((8, 4, 8), (4, 4, 8))}


def case(grid: Any, window: Any, stride: Any, tiles: Any = None) -> Case:
    """A case without dilation and causality."""
    tile_q, tile_kv = tiles or B200[grid]
    axes = len(grid)
    return Case(grid, window, stride, tile_q, tile_kv, (1,) * axes, (False,) * axes)


# grid, window, stride, visited per axis, dense, bounds (max, mean, FLOP), fully block sparse
ROWS = [
    (HUNYUAN, (18, 24, 24), (1, 1, 1), [11, 5, 5], 900, 3.27, 5.25, 11.11, False),
    (HUNYUAN, (18, 24, 24), (2, 1, 1), [10, 5, 5], 900, 3.60, 5.45, 11.11, False),
    (HUNYUAN, (18, 24, 24), (1, 1, 8), [11, 5, 3], 900, 5.45, 7.69, 11.11, False),
    (HUNYUAN, (18, 24, 24), (1, 8, 8), [11, 3, 3], 900, 9.09, 10.26, 11.11, False),
    (HUNYUAN, (18, 24, 24), (16, 8, 8), [9, 3, 3], 900, 11.11, 11.11, 11.11, True),
    (HUNYUAN, (18, 24, 24), (18, 24, 24), [15, 3, 3], 900, 6.67, 10.26, 11.11, False),
    (HUNYUAN, (30, 40, 40), (1, 1, 1), [15, 6, 7], 900, 1.43, 1.88, 2.40, False),
    (HUNYUAN, (30, 40, 40), (1, 1, 8), [15, 6, 5], 900, 2.00, 2.25, 2.40, False),
    (FLUX, (80, 80), (1, 1), [7, 12], 512, 6.10, 7.06, 10.24, False),
    (FLUX, (80, 80), (16, 16), [5, 10], 512, 10.24, 10.24, 10.24, True),
    (COSMOS, (16, 32, 48), (1, 1, 1), [4, 9, 7], 440, 1.75, 2.08, 2.29, False),
    (COSMOS, (16, 32, 48), (1, 8, 16), [4, 8, 6], 440, 2.29, 2.29, 2.29, True),
    (COSMOS, (16, 24, 16), (1, 1, 1), [4, 7, 3], 440, 5.24, 6.09, 9.17, False),
    (COSMOS, (16, 24, 16), (1, 8, 16), [4, 6, 2], 440, 9.17, 9.17, 9.17, True),
]


@pytest.mark.parametrize("row", ROWS)
def test_published_cases(row: Any) -> None:
    grid, window, stride, visited, dense, worst, mean, flops, full = row
    found = simulate(case(grid, window, stride)).to_json()
    assert found["visited_per_axis"] == visited
    assert found["visited_max"] == np.prod(visited)
    assert found["dense"] == dense
    assert found["bound_max"] == pytest.approx(worst, abs=0.006)
    assert found["bound_mean"] == pytest.approx(mean, abs=0.006)
    assert found["flop_bound"] == pytest.approx(flops, abs=0.006)
    assert found["fully_block_sparse"] == full


def test_one_axis_and_totals() -> None:
    for stride, tile, visited, full in (
        (1, 128, 17, False),
        (256, 128, 16, True),
        (1, 256, 18, False),
    ):
        found = simulate(case((32768,), (2048,), (stride,), ((tile,), (128,)))).to_json()
        assert (found["visited_max"], found["fully_block_sparse"]) == (visited, full)
    h100 = {FLUX: ((16, 8), (16, 8)), HUNYUAN: ((2, 8, 8), (2, 8, 8))}
    for grid, window, stride, total, full in (
        (FLUX, (80, 80), (1, 1), 34_884, 17_284), (FLUX, (80, 80), (16, 16), 25_600, 25_600),
        (HUNYUAN, (18, 24, 24), (1, 1, 1), 148_896, 24_768),
        (HUNYUAN, (18, 24, 24), (16, 8, 8), 72_900, 72_900),
    ):  # fmt: skip
        result = simulate(case(grid, window, stride, h100[grid]))
        assert (result.visited_total, result.full_total) == (total, full)
    for tile, total in ((128, 4336), (256, 2288)):
        assert simulate(case((32768,), (2048,), (1,), ((tile,), (128,)))).visited_total == total
    assert simulate(case(FLUX, (80, 80), (1, 1))).visited_total == 18_564
    assert simulate(case(HUNYUAN, (18, 24, 24), (1, 1, 1))).visited_total == 82_368


@pytest.mark.parametrize(
    ("share", "bound", "end"), [(0.607, 11.1, 2.23), (0.518, 10.2, 1.88), (0.587, 9.2, 2.10)]
)
def test_amdahl(share: float, bound: float, end: float) -> None:
    assert amdahl(share, bound) == pytest.approx(end, abs=0.005)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_tiles_are_those_that_windows_touch(data: Any) -> None:
    length = data.draw(st.integers(1, 40))
    dilation = data.draw(st.integers(1, min(3, length)))
    window = data.draw(st.integers(1, length // dilation))
    stride = data.draw(st.integers(1, window))
    tile_q, tile_kv = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9))
    causal = data.draw(st.booleans())
    found = simulate(
        Case((length,), (window,), (stride,), (tile_q,), (tile_kv,), (dilation,), (causal,))
    )
    visited, full, pairs = [], 0, 0
    for group in range(dilation):
        size = len(range(group, length, dilation))
        kept = np.zeros((size, size), bool)
        for i in range(size):
            lead = min(i // stride * stride + (stride - 1 if causal else stride // 2), size - 1)
            low = lead - window + 1 if causal else min(max(lead - window // 2, 0), size - window)
            kept[i, max(low, 0) : i + 1 if causal else low + window] = True
        pairs += kept.sum()
        for q in range(0, size, tile_q):
            rows = kept[q : q + tile_q]
            parts = [rows[:, k : k + tile_kv] for k in range(0, size, tile_kv)]
            visited.append(sum(p.any() for p in parts))
            full += sum(p.all() for p in parts)
    assert found.axes[0].visited.tolist() == visited
    assert found.full_total == full
    assert found.axes[0].pairs == pairs


def test_search_finds_the_full_bound() -> None:
    best = search(HUNYUAN, window=(18, 24, 24), causal=(False,) * 3)[0].to_json()
    assert best["bound_max"] == pytest.approx(best["flop_bound"])
    assert best["fully_block_sparse"]
    for result in search((64, 64), sparsity=0.9, causal=(False, False)):
        found = result.to_json()
        assert 1 / found["flop_bound"] == pytest.approx(0.1, rel=0.06)
        assert found["bound_max"] <= found["flop_bound"] + 1e-9


TILES = ["simulate", "tiles", "--grid", "30x48x80", "--window", "18x24x24", "--stride", "16x8x8",
         "--tile-q", "4x8x8", "--tile-kv", "2x8x8", "--share", "0.607"]  # fmt: skip


def test_tiles_by_the_command() -> None:
    found = attn_rewrite(*TILES, "--json").document
    keys = {"visited_per_axis", "visited_max", "visited_mean", "dense", "bound_max", "bound_mean",
            "flop_bound", "full_fraction", "fully_block_sparse", "end_to_end_bound"}  # fmt: skip
    assert keys <= set(found)
    assert found["visited_per_axis"] == [9, 3, 3]
    assert found["end_to_end_bound"] == pytest.approx(2.23, abs=0.005)
    assert "approximates" in found["approximation"]


def test_masks_are_counted(capfd: pytest.CaptureFixture[str]) -> None:
    def count(*words: str) -> Any:
        assert run(["simulate", "mask", *words, "--json"]) == 0
        return json.loads(capfd.readouterr().out)

    counts = count("radial(gamma=0.2)", "--layout", "frames=18,tokens=3840")
    assert counts["blocks_kept"] == counts["blocks_full"] == 83_728
    assert counts["blocks_total"] == 291_600
    assert counts["block_density"] == counts["element_density"] == pytest.approx(0.28713, abs=5e-6)
    # Frame after frame of one place stand together in the order hwf: a diagonal of blocks.
    moved = count(
        "reorder(order='hwf') | chunked(size=4)", "--layout", "grid=4x2x2", "--block", "4"
    )
    assert moved["blocks_kept"] == moved["blocks_full"] == 4
    text = count("clear(radius=3)", "--layout", "grid=8x8", "--text", "2", "--block", "16")
    assert text["element_density"] * 66**2 == pytest.approx(1416)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["tiles", "--grid", "8x8"], "--window"),
        (["tiles", "--grid", "8xx8", "--window", "3"], "--grid"),
        (["tiles", "--grid", "8x8", "--window", "9", "--tile-q", "2", "--tile-kv", "2"], "axis 0"),
        (["tiles", "--grid", "8x8", "--search", "--window", "4", "--stride", "2"], "--stride"),
        (["mask", "radial", "--layout", "frames=4"], "layout"),
        (["mask", "radial", "--layout", "frames=4,tokens=8"], "128"),
        (["mask", "streaming(recent=4)", "--layout", "length=64"], "not causal"),
        (["mask", "combiner", "--layout", "length=64"], "no mask"),
        (["mask", "combiner(kind='axial')", "--layout", "grid=8x8"], "no mask"),
        (["mask", "combiner(kind='axial')", "--layout", "grid=2x8x8"], "rows x columns"),
        (["mask", "reorder(order='xyz')", "--layout", "grid=2x8x8"], "no order of the grid"),
        (["mask", "blocks(table='paro')", "--layout", "length=64"], "a plan holds"),
    ],
)
def test_bad_arguments_are_one_sentence(
    arguments: list[str], said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(["simulate", *arguments]) == 2
    out, err = capfd.readouterr()
    assert not out
    assert said in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("policy", "layout"),
    [
        ("radial", "frames=6,tokens=256,text=20"), ("gna(window=[3, 5, 5])", "grid=4x8x8"),
        ("sta(window=[4, 4], tile=[2, 2])", "grid=8x8"), ("clear(radius=3)", "grid=12x12"),
        ("swin(window=4, shift=2)", "grid=8x8"), ("tile(references=2)", "frames=8,tokens=16"),
        ("bigbird(block=16)", "length=300"), ("s2(block=16, local=2)", "length=3000"),
    ],
)  # fmt: skip
def test_pictures(
    policy: str, layout: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mask.png"
    extra = ["--causal"] if policy.startswith("s2") else []
    words = ["policies", policy, "--plot", str(path), "--layout", layout, "--block", "64"]
    assert run([*words, "--json", *extra]) == 0
    drawn = json.loads(capfd.readouterr().out)
    assert drawn["empty"] + drawn["partial"] + drawn["full"] > 0
    assert path.read_bytes().startswith(b"\x89PNG")
