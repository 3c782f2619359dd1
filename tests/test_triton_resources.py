"""What kernels of serving take of a processor with their default schedules, compiled for each target.

Nothing here needs a GPU: operands are shapes, and the device of a default is the target.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from attn_rewrite.backends.triton import prepare
from attn_rewrite.backends.triton.aot import LIMITS, Binary, compile_source, fits, parse_target
from attn_rewrite.backends.triton.choose import unlisted
from attn_rewrite.backends.triton.decode import JOIN, Pages, part_schedule, split_form
from attn_rewrite.backends.triton.emit import emit
from attn_rewrite.backends.triton.prepare import lanes_of, source_of, widened
from attn_rewrite.backends.triton.varlen import default_for, program_of
from attn_rewrite.cascade.attention import QK, SoftmaxAttention, softmax_cascade
from attn_rewrite.cascade.expr import KV, B, Extent, H, Q, Read
from attn_rewrite.cascade.ir import TensorDecl
from attn_rewrite.errors import ToolError

TARGETS = tuple(LIMITS)
CACHED = Q + Extent("kv") - Extent("q") >= KV
PAGE = 64


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ATTN_REWRITE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "compiled"))


def form_of(cache: str, group: int) -> SoftmaxAttention:
    """Causal attention over a cache; with a scale for each key and value where they are integers."""
    if cache != "int8":
        return SoftmaxAttention(QK * 0.125, CACHED, group=group)
    at = (B, H // group, KV)
    scales = tuple(TensorDecl(n, ("b", "hkv", "kv")) for n in ("KS", "VS"))
    score, weight = QK * Read("KS", at), Read("VS", at)
    return SoftmaxAttention(score, CACHED, weight, None, group, scales)


def operands(d: int, f: int, cache: str, rows: int, group: int) -> dict[str, torch.Tensor]:
    """Shapes and types of a batch of four."""
    narrow = getattr(torch, cache)
    shapes = {"Q": (4, 2 * group, rows, d), "K": (4, 2, 4096, d), "V": (4, 2, 4096, f)}
    x = {n: torch.empty(s, dtype=narrow, device="meta") for n, s in shapes.items()}
    x["Q"] = x["Q"].to(torch.bfloat16)
    if cache == "int8":
        x |= {n: torch.empty(4, 2, 4096, device="meta") for n in ("KS", "VS")}
    return x


def compiled(
    monkeypatch: pytest.MonkeyPatch, kind: str, target: str, d: int, f: int, cache: str,
    rows: int = 1, group: int = 4,
) -> Binary:  # fmt: skip
    """A kernel of serving as a call on ``target`` makes it, where nothing was tuned."""
    monkeypatch.setattr(prepare, "device_of", lambda tensor: parse_target(target))
    cascade, x = (
        softmax_cascade(form_of(cache, group), "serving"),
        operands(d, f, cache, rows, group),
    )
    dtypes = dict.fromkeys("KV", cache)
    if kind == "join":
        source = emit(split_form(cascade).joined, JOIN, {"f": f})
        return compile_source(source, target, "bfloat16", {"f": f})
    if kind == "dense":
        source = source_of(program_of(cascade), x)
    elif kind == "varlen":
        program = program_of(cascade)
        schedule = widened(default_for(program, x, rows), x)
        schedule = schedule.with_(varlen=True, skipping=unlisted(program, schedule))
        source = emit(program, schedule, lanes_of(program, x))
    else:
        program = split_form(cascade).partial
        pages = Pages(x["K"], x["K"]) if kind == "paged" else None
        source = emit(program, part_schedule(program, x, pages), lanes_of(program, x))
    return compile_source(source, target, "bfloat16", {"d": d, "f": f}, {"PAGE": PAGE}, dtypes)


def check(binary: Binary, target: str) -> None:
    assert binary.resources.spilled == 0, binary.resources
    assert fits(binary.resources, LIMITS[target])


USUAL = [
    ("split", "cuda:90", 128, "bfloat16", 1), ("paged", "hip:gfx942", 64, "int8", 1),
    ("join", "cuda:80", 128, "bfloat16", 1),
]  # fmt: skip
SLOW = [
    # spilled 12 bytes with tiles of 64 keys
    ("paged", "cuda:80", 128, "int8", 16), ("paged", "cuda:100", 80, "float8_e4m3fn", 16),
    ("varlen", "cuda:90", 80, "bfloat16", 64),
    # spilled 8 bytes with blocks of 128 rows
    ("dense", "hip:gfx942", 128, "int8", 64),
]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "target", "d", "cache", "rows"),
    [*USUAL, *(pytest.param(*row, marks=pytest.mark.slow) for row in SLOW)],
)
def test_kernels_of_serving_do_not_spill(kind, target, d, cache, rows, monkeypatch):
    group = 8 if rows == 16 else 4
    check(compiled(monkeypatch, kind, target, d, d, cache, rows, group), target)


# One query of four heads a key head, or sixteen of eight: as many rows as decoding has.
SERVING = [("split", 1), ("split", 16), ("paged", 1), ("varlen", 64), ("join", 1)]


@pytest.mark.matrix
@pytest.mark.parametrize(("kind", "rows"), SERVING)
@pytest.mark.parametrize("width", [(64, 64), (80, 80), (128, 128), (192, 128), (256, 256)])
@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_of_serving_does_not_spill(target, width, kind, rows, monkeypatch):
    group = 8 if rows == 16 else 4
    check(compiled(monkeypatch, kind, target, *width, "bfloat16", rows, group), target)


@pytest.mark.matrix
@pytest.mark.parametrize(("kind", "rows"), [("paged", 16), ("dense", 64)])
@pytest.mark.parametrize("cache", ["int8", "float8_e5m2", "float8_e4m3fn"])
@pytest.mark.parametrize("d", [80, 128, 256])
@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_over_8_bits_does_not_spill(target, d, cache, kind, rows, monkeypatch):
    if cache == "float8_e4m3fn" and target == "cuda:80":
        with pytest.raises(ToolError, match="fp8e4nv"):
            compiled(monkeypatch, kind, target, d, d, cache)
        return
    check(compiled(monkeypatch, kind, target, d, d, cache, rows, 8), target)
