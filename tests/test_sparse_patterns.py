"""Every sparse pattern: its mask against a predicate written here, pair by pair, and block counts."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attn_rewrite.cascade.attention import as_softmax, usual_length
from attn_rewrite.cascade.counting import block_pairs
from attn_rewrite.cascade.cover import Cover, block_counts, block_cover
from attn_rewrite.cascade.expr import KV, Const, Expr, Extent, H, Q, Read, call, eq, substitute
from attn_rewrite.cascade.points import values
from attn_rewrite.cascade.simplify import simplify
from attn_rewrite.errors import PolicyError
from attn_rewrite.passes.transform import ScoreEdit, Transform
from attn_rewrite.policy_text import parse_pipeline
from attn_rewrite.simulate.mask import count_mask, mask_of
from attn_rewrite.site import Refusal
from attn_rewrite.token_layout import TokenLayout
from tests.sites import make_site

Keep = Callable[[int, int, int], bool]


def dense(mask: Expr, q_len: int, kv_len: int, head: int = 0) -> np.ndarray:
    """The mask of one head, evaluated at every pair."""
    literals: dict[Expr, Expr] = {H: Const(head), Extent("kv"): Const(kv_len)}
    points = {"q": np.arange(q_len)[:, None], "kv": np.arange(kv_len)[None]}
    found = values(substitute(mask, literals), points)
    return np.broadcast_to(found, (q_len, kv_len)).astype(bool)


def blocks(kept: np.ndarray, block: int) -> np.ndarray:
    """Kept pairs of every block of a dense mask."""
    rows, columns = (-(-n // block) for n in kept.shape)
    padded = np.zeros((rows * block, columns * block), int)
    padded[: kept.shape[0], : kept.shape[1]] = kept
    return padded.reshape(rows, block, columns, block).sum((1, 3))


def check(
    policy: str, layout: str, keep: Keep, *, heads: int = 1, causal: bool = False, block: int = 7
) -> np.ndarray:
    """Compare a policy's mask, cover and counts with a predicate; the dense mask of head 0."""
    tokens = TokenLayout.parse(layout)
    mask = mask_of(policy, tokens, heads=heads, causal=causal)
    size = {"q_len": tokens.q_len, "kv_len": tokens.kv_len, "block_q": block, "block_kv": block}
    first = None
    for head in range(heads):
        want = np.asarray(
            [[keep(head, q, k) for k in range(tokens.kv_len)] for q in range(tokens.q_len)]
        )
        got = dense(mask, tokens.q_len, tokens.kv_len, head)
        np.testing.assert_array_equal(got, want)
        cells = block_cover(mask, head=head, extents={"h": heads}, **size)
        counts = blocks(want, block)
        areas = blocks(np.ones_like(want), block)
        expected = np.where(counts == 0, Cover.EMPTY, np.where(counts == areas, Cover.FULL, 1))
        np.testing.assert_array_equal(cells, expected)
        summary = block_counts(mask, head=head, extents={"h": heads}, **size)
        assert summary.elements == want.sum()
        first = want if first is None else first
    assert first is not None
    return first


# Neighborhood attention, as a program over positions


def na_window(i: int, length: int, window: int, stride: int, causal: bool) -> range:
    """The keys of one query of an axis, by the definition: move the window inside."""
    group = range(i // stride * stride, min(i // stride * stride + stride, length))
    if causal:
        return range(max(group[-1] - window + 1, 0), i + 1)
    leader = min(i // stride * stride + stride // 2, length - 1)
    keys = list(range(leader - window // 2, leader - window // 2 + window))
    while keys[0] < 0:
        keys = [k + 1 for k in keys]
    while keys[-1] >= length:
        keys = [k - 1 for k in keys]
    return range(keys[0], keys[-1] + 1)


def na_axis(i: int, length: int, w: int, s: int = 1, d: int = 1, causal: bool = False) -> set[int]:
    """With dilation: windows among the positions of the same remainder."""
    group = list(range(i % d, length, d))
    return {group[n] for n in na_window(i // d, len(group), w, s, causal)}


NA1 = {
    (8, 3, 1): [0, 0, 1, 2, 3, 4, 5, 5],
    (8, 4, 1): [0, 0, 0, 1, 2, 3, 4, 4],
    (8, 5, 1): [0, 0, 0, 1, 2, 3, 3, 3],
    (8, 8, 1): [0] * 8,
    (8, 4, 2): [0, 0, 1, 1, 3, 3, 4, 4],
    (8, 4, 4): [0, 0, 0, 0, 4, 4, 4, 4],
    (10, 4, 4): [0, 0, 0, 0, 4, 4, 4, 4, 6, 6],
    (10, 6, 4): [0, 0, 0, 0, 3, 3, 3, 3, 4, 4],
}


@pytest.mark.parametrize(("case", "starts"), NA1.items())
def test_neighborhood_windows(case: tuple[int, int, int], starts: list[int]) -> None:
    length, window, stride = case
    mask = mask_of(f"gna(window={window}, stride={stride})", TokenLayout((length,)))
    kept = dense(mask, length, length)
    assert kept.argmax(1).tolist() == starts
    assert (kept.sum(1) == window).all()


def test_neighborhood_known_answers() -> None:
    def kept(policy: str, *grid: int) -> np.ndarray:
        layout = TokenLayout(grid)
        return dense(mask_of(policy, layout), layout.q_len, layout.kv_len)

    causal = kept("gna(window=3, causal=true)", 8)
    assert causal.argmax(1).tolist() == [0, 0, 0, 1, 2, 3, 4, 5]
    assert causal.sum() == 21
    strided = kept("gna(window=4, stride=2, causal=true)", 8)
    assert strided.argmax(1).tolist() == [0, 0, 0, 0, 2, 2, 4, 4]
    assert strided.sum() == 24
    assert kept("neighborhood(window=3)", 8).sum(0).tolist() == [2, 3, 4, 3, 3, 4, 3, 2]
    assert kept("neighborhood(window=4)", 8).sum(0).tolist() == [3, 4, 5, 6, 5, 4, 3, 2]
    assert kept("gna(window=5, stride=3)", 10).sum(0).tolist() == [3, 3, 6, 6, 6, 7, 7, 4, 4, 4]
    means = kept("gna(window=5, stride=3)", 10) @ np.arange(10) / 5
    assert means.tolist() == [2, 2, 2, 4, 4, 4, 7, 7, 7, 7]
    dilated = kept("neighborhood(window=3, dilation=3)", 10)
    assert [np.flatnonzero(r).tolist() for r in dilated[:4]] == [
        [0, 3, 6], [1, 4, 7], [2, 5, 8], [0, 3, 6],
    ]  # fmt: skip
    assert [np.flatnonzero(r).tolist() for r in dilated[6:]] == [
        [3, 6, 9], [1, 4, 7], [2, 5, 8], [3, 6, 9],
    ]  # fmt: skip
    two = kept("neighborhood(window=[3, 2], dilation=[2, 3])", 6, 7)
    assert two.sum() == 252
    seen = {divmod(int(k), 7) for k in np.flatnonzero(two[5 * 7 + 6])}
    assert seen == set(itertools.product((1, 3, 5), (3, 6)))
    # A plain window of the same size loses keys at the border; these are the two pairs.
    sliding = np.abs(np.arange(8)[:, None] - np.arange(8)) <= 1
    differ = np.argwhere(kept("neighborhood(window=3)", 8) != sliding)
    assert differ.tolist() == [[0, 2], [7, 5]]


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_gna_is_its_definition(data: Any) -> None:
    axes = data.draw(st.integers(1, 3))
    grid, windows, strides, dilations, causal = [], [], [], [], []
    for _ in range(axes):
        length = data.draw(st.integers(1, 12 if axes == 1 else 5))
        dilation = data.draw(st.integers(1, min(3, length)))
        window = data.draw(st.integers(1, length // dilation))
        grid.append(length)
        dilations.append(dilation)
        windows.append(window)
        strides.append(data.draw(st.integers(1, window)))
        causal.append(data.draw(st.booleans()))
    text = data.draw(st.integers(0, 3))
    flags = str(causal).lower()
    policy = f"gna(window={windows}, stride={strides}, dilation={dilations}, causal={flags})"
    shape = math.prod(grid)

    def keep(_: int, q: int, k: int) -> bool:
        if q < text or k < text:
            return True
        places = (np.unravel_index(p - text, grid) for p in (q, k))
        entries = zip(*places, grid, windows, strides, dilations, causal, strict=True)
        return all(int(j) in na_axis(int(i), *rest) for i, j, *rest in entries)

    layout = f"grid={'x'.join(map(str, grid))},text={text}"
    assert check(policy, layout, keep, block=data.draw(st.integers(1, 9))).shape[0] == shape + text


def test_sta_is_neighborhood_of_tiles() -> None:
    def keep(_: int, q: int, k: int) -> bool:
        a, b = np.unravel_index(q, (6, 8)), np.unravel_index(k, (6, 8))
        return int(b[0]) // 2 in na_axis(int(a[0]) // 2, 3, 1) and int(b[1]) // 2 in na_axis(
            int(a[1]) // 2, 4, 3
        )

    check("sta(window=[2, 6], tile=[2, 2])", "grid=6x8", keep)


@pytest.mark.parametrize(
    ("window", "density"), [((18, 24, 24), 0.09), ((30, 40, 40), 5 / 12), ((30, 24, 40), 0.25)]
)
def test_sta_densities(window: tuple[int, ...], density: float) -> None:
    found = count_mask(f"sta(window={list(window)})", TokenLayout((30, 48, 80))).to_json()
    assert found["element_density"] == pytest.approx(density, abs=1e-12)


def test_swin_windows_are_cut_at_the_border() -> None:
    def region(x: int) -> int:
        return 0 if x < 2 else (x - 2) // 4 + 1

    def keep(_: int, q: int, k: int) -> bool:
        (a, b), (c, d) = divmod(q, 8), divmod(k, 8)
        return region(a) == region(c) and region(b) == region(d)

    check("swin(window=4, shift=2)", "grid=8x8", keep)


def test_clear() -> None:
    def keep(_: int, q: int, k: int) -> bool:
        if q < 2 or k < 2:
            return q >= 2 or k < 66
        if k >= 66:
            return True
        (a, b), (c, d) = divmod(q - 2, 8), divmod(k - 2, 8)
        return math.hypot(a - c, b - d) < 3

    assert check("clear(radius=3)", "grid=8x8,text=2", keep).sum() == 1416
    pooled = check("clear(radius=3)", "grid=8x8,text=2,extra=4", keep)
    assert pooled.sum() == 1672
    whole = count_mask("clear(radius=8)", TokenLayout((64, 64))).to_json()
    assert whole["element_density"] * 4096**2 == pytest.approx(710_052)
    for side, radius, total in ((64, 8, 0.243316), (512, 8, 0.004619), (64, 32, 0.5906)):
        if side == 512:
            continue  # 262,656 tokens: counted below in larger blocks
        layout = TokenLayout((side, side), text=512)
        density = count_mask(f"clear(radius={radius})", layout).to_json()["element_density"]
        assert density == pytest.approx(total, abs=5e-5)
    big = count_mask("clear(radius=8)", TokenLayout((512, 512), text=512), block=2048).to_json()
    assert big["element_density"] == pytest.approx(0.004619, abs=5e-7)


@pytest.mark.parametrize(("radius", "size"), [(8, 193), (16, 793), (32, 3205)])
def test_clear_discs_are_open(radius: int, size: int) -> None:
    mask = mask_of(f"clear(radius={radius})", TokenLayout((80, 80)))
    middle = values(mask, {"q": np.asarray(40 * 80 + 40), "kv": np.arange(6400)})
    assert middle.sum() == size


# Radial attention


def radial_paper(frames: int, tokens: int, sink: bool) -> Keep:
    """The paper's rule, literally."""

    def keep(_: int, q: int, k: int) -> bool:
        (i, a), (j, b) = divmod(q, tokens), divmod(k, tokens)
        if sink and j == 0:
            return True
        apart = abs(i - j)
        g = 2 ** int(math.log2(max(apart, 1)))
        near = g <= tokens and abs(a - b) + 1 <= tokens / g
        return near or (apart % math.ceil(g / tokens) == 0 and a == b)

    return keep


@pytest.mark.parametrize(
    ("frames", "tokens", "plain", "with_sink"),
    [(4, 4, 220, 232), (8, 4, 652, 712), (12, 16, 21_816, 23_424), (32, 16, 86_416, 92_704)],
)
def test_radial_paper(frames: int, tokens: int, plain: int, with_sink: int) -> None:
    layout = f"frames={frames},tokens={tokens}"
    for sink, count in ((False, plain), (True, with_sink)):
        policy = f"radial(rule='paper', sink={str(sink).lower()})"
        if frames * tokens <= 192:
            check(policy, layout, radial_paper(frames, tokens, sink), block=16)
        found = count_mask(policy, TokenLayout.parse(layout), block=8).to_json()
        assert found["element_density"] * (frames * tokens) ** 2 == pytest.approx(count)
    n, s = frames * tokens, tokens
    assert plain < 4 * s * n * (math.log2(n) - math.log2(s))


def radial_released(frames: int, tokens: int, gamma: float, old: bool, sink: bool) -> np.ndarray:
    """The released rule by materialising every pair of frames and counting columns."""
    block, count = 128, frames * tokens
    side = -(-count // block)
    out = np.zeros((side, side), bool)
    power = 2 ** tokens.bit_length()
    places = np.arange(tokens)
    for i, j in itertools.product(range(frames), repeat=2):
        apart = abs(i - j)
        scale = power / 2 ** apart.bit_length()
        width: float = tokens
        if apart == 1 and old:
            width = tokens // 2
        elif apart > 1:
            width = max(block, gamma * scale)
        if sink and j == 0:
            width = tokens
        elif scale < 128 and apart % int(128 / scale):
            continue
        rows, columns = i * tokens, j * tokens
        kept = np.zeros((-(-(rows % block + tokens) // block) * block,
                         -(-(columns % block + tokens) // block) * block), bool)  # fmt: skip
        near = np.abs(places[:, None] - places) <= width
        kept[rows % block :, columns % block :][:tokens, :tokens] = near
        sums = kept.reshape(-1, block, kept.shape[1] // block, block).sum(1)
        touched, high = (sums > 0).sum(-1), (sums > block / 3).sum(-1)
        enough = (touched > 0) & (high > 0.6 * touched)
        at, to = rows // block, columns // block
        out[at : at + enough.shape[0], to : to + enough.shape[1]] |= enough
    out[count // block :] = True
    out[:, count // block :] = True
    return out


RADIAL = [
    (8, 256, 1.0, 232, 232), (16, 256, 1.0, 704, 704), (32, 256, 1.0, 1912, 1912),
    (8, 512, 1.0, 888, 862), (16, 512, 1.0, 2848, 2790), (16, 1024, 0.2, 8152, 7804),
    (8, 192, 1.0, 120, None), (4, 320, 1.0, 99, None),
]  # fmt: skip


@pytest.mark.parametrize(("frames", "tokens", "gamma", "new", "old"), RADIAL)
def test_radial_released(frames: int, tokens: int, gamma: float, new: int, old: int | None) -> None:
    layout = TokenLayout((frames, tokens))
    for rule, count in (("released", new), ("released-2025-06", old)):
        mask = mask_of(f"radial(rule='{rule}', gamma={gamma})", layout)
        size = {"q_len": layout.q_len, "kv_len": layout.kv_len, "block_q": 128, "block_kv": 128}
        cells = block_cover(mask, **size)
        assert set(np.unique(cells)) <= {Cover.EMPTY, Cover.FULL}
        want = radial_released(frames, tokens, gamma, rule != "released", True)
        np.testing.assert_array_equal(cells == Cover.FULL, want)
        assert count is None or want.sum() == count


@pytest.mark.parametrize(("frames", "tokens"), [(5, 300), (3, 130), (6, 225), (4, 200)])
@pytest.mark.parametrize("rule", ["released", "released-2025-06"])
def test_radial_released_where_blocks_straddle_frames(frames: int, tokens: int, rule: str) -> None:
    layout = TokenLayout((frames, tokens))
    mask = mask_of(f"radial(rule='{rule}', gamma=0.4, sink=false)", layout)
    want = radial_released(frames, tokens, 0.4, rule != "released", False)
    kept = dense(mask, layout.q_len, layout.kv_len)
    np.testing.assert_array_equal(
        kept, want.repeat(128, 0).repeat(128, 1)[: kept.shape[0], : kept.shape[1]]
    )


@pytest.mark.parametrize(
    ("layout", "options", "density"),
    [
        ((18, 3840), "gamma=0.2", 0.28713),
        ((18, 3840), "gamma=0.2, rule='released-2025-06'", 0.26337),
        ((30, 3840), "gamma=0.95, sink=false", 0.27463),
        ((20, 3840), "gamma=0.8", 0.35253),
        ((21, 2700), "gamma=0.2, rule='released-2025-06'", 0.265),
    ],
)
def test_radial_densities_of_published_settings(
    layout: tuple[int, int], options: str, density: float
) -> None:
    found = count_mask(f"radial({options})", TokenLayout(layout)).to_json()
    digits = 5e-4 if density == 0.265 else 5e-6
    assert found["block_density"] == pytest.approx(density, abs=digits)


def test_radial_saturates() -> None:
    layout = TokenLayout((18, 3840))
    none, small = (count_mask(f"radial(gamma={g})", layout).to_json() for g in (1e-9, 0.2))
    assert none["blocks_kept"] == small["blocks_kept"]


@pytest.mark.parametrize(("frames", "references", "kept"), [(8, 2, 34), (24, 3, 156), (5, 0, 5)])
def test_tile(frames: int, references: int, kept: int) -> None:
    policy = f"tile(references={references})"
    found = count_mask(policy, TokenLayout((frames, 6)), block=6).to_json()
    assert found["blocks_kept"] == found["blocks_full"] == kept
    assert kept == frames**2 - (frames - references) * (frames - references - 1)
    spread = {math.ceil(n * frames / references) for n in range(references)}

    def keep(_: int, q: int, k: int) -> bool:
        return q // 6 == k // 6 or q // 6 in spread or k // 6 in spread

    check(policy, f"frames={frames},tokens=6", keep)


# Texts


def s2(m: int, n: int, h: int, *, local: int, vertical: int, heads: int, offset: int) -> bool:
    step = max(1, vertical // heads)
    return n <= m and (m - n < local or (n + h * step + offset) % vertical == 0)


def test_s2_known_answers() -> None:
    for offset, counts in ((0, [23, 18, 19, 21]), (1, [18, 19, 21, 23])):
        policy = f"s2(local=2, vertical=4, block=4, offset={offset})"
        mask = mask_of(policy, TokenLayout((32,)), heads=4, causal=True)
        found = [
            (block_cover(mask, q_len=32, kv_len=32, block_q=4, block_kv=4, head=h) > 0)
            for h in range(4)
        ]
        assert [int(c.sum()) for c in found] == counts
        head = next(n for n, c in enumerate(counts) if c == 23)
        rows = [np.flatnonzero(r).tolist() for r in found[head]]
        assert rows == [[0], [0, 1], [0, 1, 2], [0, 2, 3], [0, 3, 4], [0, 4, 5],
                        [0, 4, 5, 6], [0, 4, 6, 7]]  # fmt: skip

        def keep(h: int, q: int, k: int, offset: int = offset) -> bool:
            blocks = s2(q // 4, k // 4, h, local=2, vertical=4, heads=4, offset=offset)
            return blocks and k <= q

        check(policy, "length=30", keep, heads=4, causal=True, block=4)


def s2_lists(blocks: int, heads: int, local: int, vertical: int) -> list[list[list[int]]]:
    """Key blocks of each block row of each head, offset as in Phi-3-small and ONNX Runtime."""
    policy = f"s2(local={local}, vertical={vertical}, block=2)"
    mask = mask_of(policy, TokenLayout((2 * blocks,)), heads=heads, causal=True)
    size = {"q_len": 2 * blocks, "kv_len": 2 * blocks, "block_q": 2, "block_kv": 2}
    cells = [block_cover(mask, head=h, **size) > 0 for h in range(heads)]
    return [[np.flatnonzero(row).tolist() for row in c] for c in cells]


def test_s2_lists_of_phi_3_and_onnx_runtime() -> None:
    first, *_, last = s2_lists(8, 4, 2, 4)
    assert first == [[0], [0, 1], [1, 2], [2, 3], [3, 4], [3, 4, 5], [3, 5, 6], [3, 6, 7]]
    assert last == [
        [0], [0, 1], [0, 1, 2], [0, 2, 3], [0, 3, 4], [0, 4, 5], [0, 4, 5, 6], [0, 4, 6, 7],
    ]  # fmt: skip
    assert s2_lists(4, 2, 2, 2) == [
        [[0], [0, 1], [1, 2], [1, 2, 3]],
        [[0], [0, 1], [0, 1, 2], [0, 2, 3]],
    ]


def test_s2_heads_cover_the_text_and_forget_for_good() -> None:
    mask = mask_of("s2(local=1, vertical=8, block=2, offset=0)", TokenLayout((32,)), heads=8,
                   causal=True)  # fmt: skip
    covers = [
        block_cover(mask, q_len=32, kv_len=32, block_q=2, block_kv=2, head=h) > 0 for h in range(8)
    ]
    assert [int(c[-1].sum()) for c in covers] == [3, 2, 3, 3, 3, 3, 3, 3]
    assert np.logical_or.reduce([c[-1] for c in covers]).all()
    for c in covers:  # once a block does not see a key block, no later one does
        for n in range(16):
            assert (np.diff(c[n:, n].astype(int)) <= 0).all()


def test_s2_stripes_by_distance() -> None:
    """Spec, section 11, S2-5: 12 blocks, local 2, every third; row 11, and blocks that return."""
    policy = "s2(local=2, vertical=3, block=2, mode='relative')"
    size = {"q_len": 24, "kv_len": 24, "block_q": 2, "block_kv": 2}
    cells = block_cover(mask_of(policy, TokenLayout((24,)), causal=True), **size) > 0
    assert np.flatnonzero(cells[11]).tolist() == [1, 4, 7, 10, 11]
    falls = [(np.diff(cells[n:, n].astype(int)) <= 0).all() for n in range(12)]
    assert not all(falls)

    def keep(causal: bool) -> Keep:
        def kept(_: int, q: int, k: int) -> bool:
            m, n = q // 2, k // 2
            left, right = max(0, m - n - 2 + 1), max(0, n - m - 2 + 1)
            return (left + right) % 3 == 0 and (not causal or k <= q)

        return kept

    check(policy, "length=23", keep(causal=False))
    check(policy, "length=23", keep(causal=True), causal=True)


def test_longlora_does_not_leak() -> None:
    def keep(h: int, q: int, k: int) -> bool:
        group = (lambda x: (x + 2) // 4) if h else (lambda x: x // 4)
        return k <= q and (group(q) == group(k))

    check("longlora(size=4)", "length=8", keep, heads=2, causal=True)
    mask = mask_of("longlora(size=4)", TokenLayout((8,)), heads=2, causal=True)
    assert [dense(mask, 8, 8, h).sum() for h in (0, 1)] == [20, 16]
    longer = mask_of("longlora(size=4)", TokenLayout((16,)), heads=2, causal=True)
    assert [dense(longer, 16, 16, h).sum() for h in (0, 1)] == [40, 36]
    check("longlora(size=4, sinks=2)", "length=9", lambda h, q, k: keep(h, q, k) or (k < 2 and k <= q),
          heads=2, causal=True)  # fmt: skip


def test_streaming() -> None:
    kept = check(
        "streaming(recent=4, sinks=2)", "length=16",
        lambda _, q, k: k <= q and (k < 2 or q - k < 4), causal=True,
    )  # fmt: skip
    assert kept.sum(1).tolist() == [1, 2, 3, 4, 5] + [6] * 11
    assert kept.sum() == 81


SIMPLE: list[tuple[str, Keep]] = [
    ("chunked(size=5)", lambda _, q, k: q // 5 == k // 5),
    ("prefix(size=3)", lambda _, q, k: k < 3 or k <= q),
    ("longformer(window=6, global_tokens=2)", lambda _, q, k: abs(q - k) <= 3 or min(q, k) < 2),
    ("union(of=[chunked(size=5), window(left=1, right=1)])", lambda _, q, k: q // 5 == k // 5 or abs(q - k) < 2),
    ("intersection(of=[chunked(size=5), window(left=1, right=1)])",
     lambda _, q, k: q // 5 == k // 5 and abs(q - k) < 2),
]  # fmt: skip


@pytest.mark.parametrize(("policy", "keep"), SIMPLE)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length", [1, 6, 23])
def test_plain_texts(policy: str, keep: Keep, causal: bool, length: int) -> None:
    def expected(h: int, q: int, k: int) -> bool:
        return keep(h, q, k) and (k <= q or not causal)

    check(policy, f"length={length}", expected, causal=causal, block=4)


def test_bigbird_draws_per_block_row_and_seed() -> None:
    def kept(seed: int, length: int = 640) -> np.ndarray:
        policy = f"bigbird(block=10, global_blocks=1, random=3, seed={seed})"
        mask = mask_of(policy, TokenLayout((length,)))
        return dense(mask, length, length)

    first, again, other = kept(0), kept(0), kept(1)
    assert (first == again).all()
    assert (first != other).any()
    shape = first.reshape(64, 10, 64, 10)
    assert (shape.all((1, 3)) == shape.any((1, 3))).all()
    cells = shape.any((1, 3))
    near = np.abs(np.arange(64)[:, None] - np.arange(64)) <= 1
    assert cells[near].all()
    assert cells[0].all()
    assert cells[:, 0].all()
    drawn = (cells & ~near)[1:, 1:].sum(1)
    assert drawn.max() <= 3
    assert drawn.mean() > 2
    assert len({tuple(np.flatnonzero(r)) for r in (cells & ~near)[1:, 1:]}) > 50


# Counting, sizes and refusals


@pytest.mark.parametrize(
    ("policy", "layout"),
    [
        ("radial(gamma=0.95, sink=false)", TokenLayout((33, 3600))),
        ("radial(rule='paper')", TokenLayout((33, 3600))),
        ("gna(window=[18, 24, 24])", TokenLayout((33, 45, 80))),
        ("gna(window=[5, 8, 8], dilation=[3, 5, 5])", TokenLayout((33, 45, 80))),
        ("gna(window=[5, 8, 8], stride=[2, 3, 1], dilation=[2, 2, 3])", TokenLayout((33, 45, 80))),
    ],
)
def test_large_masks_are_counted_without_a_matrix(policy: str, layout: TokenLayout) -> None:
    import tracemalloc

    assert layout.q_len == 118_800
    mask = mask_of(policy, layout)
    tracemalloc.start()
    pairs = block_pairs(mask, q_len=118_800, kv_len=118_800, block_q=128, block_kv=128)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 30
    assert pairs is not None
    rows = np.random.default_rng(0).integers(0, 118_800, 24)
    some = values(mask, {"q": rows[:, None], "kv": np.arange(118_800)[None]})
    if policy.startswith("gna"):
        seen = 5 * 8 * 8 if "dilation" in policy else 18 * 24 * 24
        assert (some.sum(1) == seen).all()
        assert pairs.sum() == 118_800 * seen
    kept = np.add.reduceat(some, np.arange(0, 118_800, 128), axis=1)
    # A key block that one query sees is not empty, and a full one is seen whole by every query.
    assert (pairs[rows // 128][kept > 0] > 0).all()


@pytest.mark.parametrize(
    "mask",
    [
        (KV <= Q) & (Q - KV < 9),
        (KV <= Q) & eq(Q // 4 % 3, KV // 4 % 3) | (KV < 5),
        ~((Q // 8 - KV // 8 < 2) & (KV <= Q)) & call("ne", Q, KV),
        eq((Q - 3) // 6, (KV - 3) // 6) & (Q >= 3) & (KV >= 3),
        (Q // 6 - KV // 6) * (Q // 6 - KV // 6) + (Q % 6 - KV % 6) * (Q % 6 - KV % 6) <= 5,
        (Q >= KV + 7) | (Q > 11) & (KV % 5 < 2),
    ],
)
@pytest.mark.parametrize("block", [(1, 1), (4, 8), (5, 3), (64, 64)])
def test_closed_form_is_exact(mask: Expr, block: tuple[int, int]) -> None:
    found = block_pairs(mask, q_len=41, kv_len=37, block_q=block[0], block_kv=block[1])
    assert found is not None
    want = dense(mask, 41, 37)
    for (i, j), count in np.ndenumerate(found):
        a, b = slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1])
        assert want[a, b].sum() == count


@pytest.mark.parametrize("mask", [Read("M", (KV,)), call("eq", Q // 4, KV // 6), Q * KV < 30])
def test_no_closed_form_is_said(mask: Expr) -> None:
    result = block_pairs(mask, q_len=5000, kv_len=5000, block_q=64, block_kv=64)
    assert result is None or result.sum() == dense(mask, 5000, 5000).sum()


def test_blocks_of_causal_and_sliding_masks() -> None:
    """Spec, section 11, BM-1 and BM-2; cut blocks at the end count as full where all is kept."""

    def counts(mask: Expr, length: int) -> tuple[list[int], list[int]]:
        cells = block_cover(mask, q_len=length, kv_len=length, block_q=128, block_kv=128)
        return (cells == Cover.PARTIAL).sum(1).tolist(), (cells == Cover.FULL).sum(1).tolist()

    assert counts(KV <= Q, 512) == ([1, 1, 1, 1], [0, 1, 2, 3])
    assert counts(KV <= Q, 500) == ([1, 1, 1, 1], [0, 1, 2, 3])
    for reach in (256, 257):  # different masks, the same blocks
        window = (Q - KV >= 0) & (reach > Q - KV)
        assert counts(window, 1024) == ([1, 1, 2, 2, 2, 2, 2, 2], [0, 1, 1, 1, 1, 1, 1, 1])


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("grid=30x48x80,text=256", ((30, 48, 80), 256, 115_456)),
        ("frames=18, tokens=3840", ((18, 3840), 0, 69_120)),
        ("length=77", ((77,), 0, 77)),
    ],
)
def test_layouts_are_read_and_printed(text: str, shape: tuple[Any, int, int]) -> None:
    layout = TokenLayout.parse(text)
    assert (layout.grid, layout.text, layout.q_len) == shape
    assert TokenLayout.parse(str(layout)) == layout


@pytest.mark.parametrize(
    "text", ["", "grid=", "grid=3x4x5x6", "grid=0x4", "frames=3", "length=4,grid=2x2", "text=5",
             "length=-3", "grid=3x4,grid=3x4", "length=3,words=4"]
)  # fmt: skip
def test_bad_layouts_are_one_sentence(text: str) -> None:
    with pytest.raises(PolicyError) as caught:
        TokenLayout.parse(text)
    assert "write grid=" in str(caught.value)


@pytest.mark.parametrize(
    ("policy", "code"),
    [
        ("radial(layout='frames=4,tokens=7')", "layout-misfit"),
        ("clear(radius=2)", "layout-unknown"),
        ("neighborhood(window=[3, 3])", "layout-unknown"),
        ("neighborhood(window=40)", "neighborhood-misfit"),
        ("sta(window=[4, 3], tile=[2, 3], layout='grid=4x8')", "sta-misfit"),
        ("streaming(recent=4)", "streaming-not-causal"),
        ("s2", "s2-not-causal"),
        ("tile(references=9, layout='frames=4,tokens=8')", "tile-misfit"),
        ("radial(layout='frames=4,tokens=8')", "radial-misfit"),
    ],
)
def test_what_does_not_fit_is_refused(policy: str, code: str) -> None:
    site = make_site()
    (transform,) = parse_pipeline(policy)
    result = transform.apply(site.cascade, site)
    assert isinstance(result, Refusal)
    assert result.code == code


@pytest.mark.parametrize(
    "policy",
    ["gna(window=0)", "gna(window=[3, 3], stride=[1])", "sta(window=[5], tile=[2])", "swin(window=4, shift=4)",
     "radial(rule='paper', gamma=0.5)", "radial(rule='new')", "union(of=[])", "clear",
     "radial(layout='frames=4')", "s2(mode='relative', offset=0)", "s2(mode='other')"],
)  # fmt: skip
def test_bad_options_are_policy_errors(policy: str) -> None:
    with pytest.raises(PolicyError):
        parse_pipeline(policy)


def test_policies_print_and_parse() -> None:
    for policy in (
        "union(of=[window(size=3), radial(rule='paper', layout='grid=4x8')])",
        "gna(window=[3, 5], stride=[1, 2], layout='grid=4x8')",
    ):
        (transform,) = parse_pipeline(policy)
        assert parse_pipeline(str(transform)) == (transform,)


@pytest.mark.parametrize(
    ("policy", "facts"),
    [
        ("streaming(recent=8, sinks=2)", {"causal": True}),
        ("s2(local=2, vertical=4, block=4)", {"causal": True, "hkv": 2}),
        ("longlora(size=8)", {"causal": True}),
        ("gna(window=[3, 4], stride=[1, 2], layout='grid=4x8')", {}),
        ("sta(window=[2, 4], tile=[2, 2], layout='grid=4x8')", {}),
        ("swin(window=[2, 4], shift=[1, 2], layout='grid=4x8')", {}),
        ("clear(radius=3, layout='grid=4x7,text=4')", {}),
        ("radial(rule='paper', layout='frames=4,tokens=8')", {}),
        ("tile(references=1, layout='frames=4,tokens=8')", {}),
        ("longformer(window=6, global_tokens=2)", {}),
        ("bigbird(block=4)", {}),
        ("blocks(table='paro', block=8, semantics='post-mask')", {}),
        ("reorder(order=['wh', 'hw', 'wh', 'wh'], layout='grid=4x8')", {}),
        ("reorder(order='wh', layout='grid=4x8') | window(size=4)", {}),
    ],
)
def test_golden_cascades(
    golden: Callable[[str, str], None], policy: str, facts: dict[str, Any]
) -> None:
    site = make_site(**facts)
    cascade = site.cascade
    for transform in parse_pipeline(policy):
        after = transform.apply(cascade, site)
        assert not isinstance(after, Refusal)
        cascade, site = after, transform.after(site)
    name = "-".join(part.strip().partition("(")[0] for part in policy.split("|"))
    golden(f"sparse/{name}.txt", f"{make_site(**facts).cascade}\n\n-- {policy}\n\n{cascade}\n")


def test_a_layout_says_nothing_of_other_lengths() -> None:
    """Where the length may change, the mask holds at the length of the layout alone."""

    class Length:  # what a dynamic length shows of itself
        node = type("Node", (), {"hint": 32})()

    policy = "neighborhood(window=[3, 3], layout='grid=4x8')"
    (transform,) = parse_pipeline(policy)
    site = make_site(q_len=Length(), kv_len=Length())
    mask = transform.mask(site)  # type: ignore[attr-defined]
    fixed = transform.mask(make_site())  # type: ignore[attr-defined]
    assert usual_length(mask) == usual_length(simplify(mask)) == 32
    assert usual_length(fixed) is None
    np.testing.assert_array_equal(dense(mask, 32, 32), dense(fixed, 32, 32))
    assert dense(mask, 40, 40).all()
    other = make_site(q_len=40, kv_len=40)
    refused = transform.apply(other.cascade, other)
    assert isinstance(refused, Refusal)
    assert refused.code == "layout-misfit"


def test_causality_becomes_a_guard() -> None:
    site = make_site(causal=True)
    eager = make_site(causal=True, cascade=make_site().cascade)  # causal by an additive mask
    (chunks,) = parse_pipeline("chunked(size=8)")
    for one in (site, eager):
        result = chunks.apply(one.cascade, one)
        assert not isinstance(result, Refusal)
        form = as_softmax(result)
        assert form is not None
        counts = block_counts(form.guard, q_len=32, kv_len=32, block_q=4, block_kv=4)
        assert counts.kept == 12


def test_edits_that_use_positions_are_refused_between_sequences() -> None:
    class Softcap(ScoreEdit):
        name = "softcap"

        def score(self, s: Expr, site: Any) -> Expr:
            return call("tanh", s)

    class Alibi(ScoreEdit):
        name = "alibi"

        def score(self, s: Expr, site: Any) -> Expr:
            return s - call("abs", Q - KV)

    edits: list[tuple[Transform, bool]] = [(Softcap(), False), (Alibi(), True)]
    for edit, positional in edits:
        for kind in ("cross", "joint", "pooling"):
            assert (edit.admits(make_site(kind=kind)) is not None) == positional
        assert edit.admits(make_site()) is None
        assert edit.admits(make_site(kind="cross"), ("cross",)) is None
