"""Attention over integer codes as ONNX: integer products, mapped probabilities, and refusals."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.inliner
import pytest
import torch
import torch.nn.functional as functional

import attn_rewrite as ar
from attn_rewrite import export_onnx
from attn_rewrite.backends.onnx import products
from attn_rewrite.errors import LowerError, VerifyError

HEADS, KEY_HEADS, D = 4, 2, 8
AXES = {0: torch.export.Dim("batch", min=1), 2: torch.export.Dim("length", min=1)}


@pytest.fixture(scope="module", autouse=True)
def translations_read_once() -> Iterator[None]:
    import onnxscript._framework_apis.torch_2_5 as apis

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(apis, "get_torchlib_ops", functools.cache(apis.get_torchlib_ops))
        yield


class Attention(torch.nn.Module):
    """Attention over given queries, keys and values; nothing before it rounds."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        sdpa = functional.scaled_dot_product_attention
        return sdpa(q, k, v, attn_mask=mask, enable_gqa=k.shape[1] < q.shape[1], **self.options)


def operands(length: int = 40, key_heads: int = HEADS, seed: int = 0) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(2, h, length, D, generator=random) for h in (HEADS, key_heads, key_heads)]


def codes(x: np.ndarray, axes: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Symmetric int8 codes with one scale over ``axes``."""
    scale = np.maximum(np.abs(x), 1e-30).max(axes, keepdims=True) / 127
    return np.clip(np.rint(x / scale), -127, 127), scale


def reference(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, keep: np.ndarray | bool, pv: bool = False
) -> np.ndarray:
    """One scale per head for Q and K; with ``pv`` P below its maximum times 127, V per channel."""
    q, k, v = (np.float64(x) for x in (q, k, v))
    k, v = (np.repeat(x, q.shape[1] // x.shape[1], 1) for x in (k, v))
    (qc, qs), (kc, ks) = codes(q, (2, 3)), codes(k, (2, 3))
    score = np.where(keep, qc @ kc.swapaxes(-1, -2) * qs * ks / np.sqrt(D), -np.inf)
    p = np.exp(score - score.max(-1, keepdims=True))
    total = p.sum(-1, keepdims=True)
    if not pv:
        return p / total @ v
    vc, vs = codes(v, (2,))
    return np.rint(p * 127) @ vc * vs / 127 / total


PLAIN = "granularity='head', smooth_k=false, smooth_v=false"


def kinds(path: Path) -> dict[str, int]:
    """Operators of the file with its functions written out, nested graphs included."""
    found: dict[str, int] = {}

    def walk(graph: onnx.GraphProto) -> None:
        for node in graph.node:
            assert not node.domain, node.domain
            found[node.op_type] = found.get(node.op_type, 0) + 1
            for attribute in node.attribute:
                if attribute.type == onnx.AttributeProto.GRAPH:
                    walk(attribute.g)

    walk(onnx.inliner.inline_local_functions(onnx.load(path)).graph)
    return found


def distances(length: int) -> np.ndarray:
    at = np.arange(length)
    return at[:, None] - at


CASES = {
    "all keys": (Attention(), f"int8({PLAIN})", lambda d: d == d),
    "causal": (Attention(is_causal=True), f"int8({PLAIN})", lambda d: d >= 0),
    "window": (
        Attention(is_causal=True), f"window(size=6) | int8({PLAIN})", lambda d: (d >= 0) & (d < 6)
    ),
    "probabilities": (Attention(), f"int8(pv=true, {PLAIN})", lambda d: d == d),
    "probabilities in a window": (
        Attention(is_causal=True), f"window(size=6) | int8(pv=true, {PLAIN})",
        lambda d: (d >= 0) & (d < 6),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_integer_products_give_what_codes_written_by_hand_give(case: str, tmp_path: Path) -> None:
    model, policy, keep = CASES[case]
    given = operands(300, KEY_HEADS)
    done = ar.optimize(model.eval(), policy, tuple(given), dynamic_shapes=[AXES] * 3)
    artifact = export_onnx(done, tmp_path / "m.onnx")
    (site,) = artifact.sites
    pv = "pv=true" in policy
    assert site.operator == "coded_attention"
    assert f"integer products Q K{' and P V' if pv else ''}" in site.detail
    assert kinds(artifact.path)["MatMulInteger"] == 1 + pv
    assert site.skips == (case not in ("all keys", "probabilities"))
    for length, seed in itertools.product((300, 17, 1), (1, 2)):
        tensors = [t.numpy() for t in operands(length, KEY_HEADS, seed)]
        inputs = dict(zip("qkv", tensors, strict=True))
        wanted = reference(*tensors, keep(distances(length)), pv)
        # Inputs are given, so a code never rounds the other way; a probability may, where the
        # exponential of another library is off by its last bit.
        artifact.verify(inputs, {"output": wanted}, bound={"output": 2e-6 * np.abs(wanted).max()})


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_a_mask_that_is_an_input_masks_integer_products(kind: str, tmp_path: Path) -> None:
    given = operands()
    keep = torch.rand(2, 1, 40, 40, generator=torch.Generator().manual_seed(3)) < 0.7
    keep |= torch.eye(40, dtype=torch.bool)
    mask = keep if kind == "bool" else torch.where(keep, 0.0, -torch.inf)
    done = ar.optimize(Attention().eval(), f"int8({PLAIN})", (*given, mask), dynamic_shapes={})
    artifact = export_onnx(done, tmp_path / "m.onnx")
    tensors = [t.numpy() for t in given]
    inputs = dict(zip(("q", "k", "v", "mask"), (*tensors, mask.numpy()), strict=True))
    wanted = reference(*tensors, keep.numpy())
    artifact.verify(inputs, {"output": wanted}, bound={"output": 2e-6 * np.abs(wanted).max()})
    assert kinds(artifact.path)["MatMulInteger"] == 1


@pytest.mark.parametrize(
    "policy", ["int8", "int8(pv=true)", pytest.param("int4(pv=true)", marks=pytest.mark.slow), "int8(rotate=true, granularity='thread')",
               "dgq(bits=4)", "dgq(per='row')", "kv_int4"]
)  # fmt: skip
def test_every_scheme_with_an_onnx_form_agrees(policy: str, tmp_path: Path) -> None:
    """The export compares with the program at two sizes; scales are computed at run time."""
    given = operands(150)
    done = ar.optimize(
        Attention().eval(), policy, tuple(given), dynamic_shapes=[AXES] * 3
    )  # fmt: skip
    assert done.report.sites[0].status == "unbudgeted"
    assert export_onnx(done, tmp_path / "m.onnx").errors


def test_a_wrong_zero_point_does_not_leave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = ar.optimize(Attention().eval(), "int8", tuple(operands()), dynamic_shapes={})
    monkeypatch.setattr(products, "ZERO", 127)
    with pytest.raises(VerifyError, match="off by"):
        export_onnx(done, tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("policy", ["fp8", "fp8(pv=false)", "int8(pv='fp8')", "fp4"])
def test_small_floats_are_refused_before_anything_is_written(policy: str, tmp_path: Path) -> None:
    done = ar.optimize(Attention().eval(), policy, tuple(operands()), dynamic_shapes={})
    with pytest.raises(LowerError, match=r"attention#0.*floats of 8 bits or less") as caught:
        export_onnx(done, tmp_path / "m.onnx")
    assert [(r.code, r.site) for r in caught.value.refusals] == [("onnx-float8", "attention#0")]
    assert not list(tmp_path.iterdir())


def test_onnx_runtimes_own_operators_multiply_floats_and_say_so(tmp_path: Path) -> None:
    done = ar.optimize(Attention().eval(), "int8", tuple(operands(400)), dynamic_shapes={})
    (site,) = export_onnx(done, tmp_path / "m.onnx", target="onnxruntime").sites
    assert site.form == "MultiHeadAttention"
    assert "integer products are slower" in site.choice
