"""Clipped softmax under a sparse mask: tiles that skip what the mask leaves out, on torch and in
files."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attn_rewrite as ar
from attn_rewrite import export_onnx
from attn_rewrite.backends.torch.mapped import mapped_attention
from attn_rewrite.passes.transform import Exactness
from tests.test_onnx_patterns import scores

HEADS, KEY_HEADS, WIDTH = 4, 2, 8


class Model(nn.Module):
    """Queries, keys and values side by side, [batch, length, 64]; ``strict``: keys before the
    query only, so that row 0 has none."""

    def __init__(self, strict: bool = False) -> None:
        super().__init__()
        self.strict = strict

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = apart(x)
        n = x.shape[1]
        mask = torch.ones(n, n, dtype=torch.bool).tril(-1) if self.strict else None
        return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)


def apart(x: Tensor) -> list[Tensor]:
    parts = x.split([h * WIDTH for h in (HEADS, KEY_HEADS, KEY_HEADS)], -1)
    return [p.unflatten(-1, (-1, WIDTH)).transpose(1, 2) for p in parts]


def tokens(n: int, b: int = 2) -> Tensor:
    return 2 * torch.randn(b, n, 64, generator=torch.Generator().manual_seed(n))


def dense(x: Tensor, keep: Tensor, gamma: float | None, zeta: float = 1.0) -> Tensor:
    """Bondarenko et al. 2023, equation 4, of the kept keys; the others have probability 0."""
    q, k, v = apart(x)
    k, v = (t.repeat_interleave(HEADS // KEY_HEADS, 1) for t in (k, v))
    low = -4.0 / x.shape[1] if gamma is None else gamma
    s = (q @ k.mT * WIDTH**-0.5).masked_fill(~keep, -torch.inf)
    p = s.softmax(-1).nan_to_num(0.0)
    return ((zeta - low) * p + low).clip(0, 1) * keep @ v


def window(n: int, strict: bool) -> Tensor:
    distance = torch.arange(n)[:, None] - torch.arange(n)
    return (distance > 0) & (distance < 16) if strict else (distance <= 8) & (distance >= -7)


def close(got: Tensor, x: Tensor, *args: object) -> None:
    want = dense(x.double(), *args)  # type: ignore[arg-type]
    own = (dense(x.float(), *args).double() - want).abs().max().item()  # type: ignore[arg-type]
    eps = torch.finfo(got.dtype).eps
    allowed = max(2 * own, 4 * eps * want.abs().max().item())
    assert (got.double() - want).abs().max().item() <= allowed


@pytest.fixture(scope="module", autouse=True)
def translations_read_once() -> Iterator[None]:
    import onnxscript._framework_apis.torch_2_5 as apis

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(apis, "get_torchlib_ops", functools.cache(apis.get_torchlib_ops))
        yield


@pytest.mark.parametrize("strict", [False, True])
def test_tiles_on_torch(strict: bool) -> None:
    policy = "window(size=16) | clipped_softmax"
    x = tokens(301)
    done = ar.optimize(Model(strict), policy, (x,), dynamic_shapes={})
    (site,) = done.report.sites
    assert (site.kernel, site.refusals) == ("mapped", ())
    executed, total = site.cost_after.tiles
    assert executed < total / 2
    close(done(x), x, window(301, strict), None)
    if strict:
        assert (done(x)[..., 0, :] == 0).all()
    assert site.exactness == Exactness.APPROXIMATE.value


@pytest.mark.parametrize(
    ("target", "strict"),
    [("portable", True), pytest.param("onnxruntime", False, marks=pytest.mark.slow)],
)
def test_tiles_in_a_file_of_any_length(target: str, strict: bool, tmp_path: Path) -> None:
    done = ar.optimize(Model(strict), "window(size=16) | clipped_softmax(gamma=-0.03, zeta=1.1)",
                       (tokens(200),))  # fmt: skip
    artifact = export_onnx(done, tmp_path / "m.onnx", target=target)
    (site,) = artifact.sites
    assert (site.form, site.skips) == ("tiles", True)
    for n, b in ((200, 2), (131, 1), (17, 3)):
        x = tokens(n, b)
        found = torch.from_numpy(artifact.run({"x": x.numpy()})["output"])
        close(found, x, window(n, strict), -0.03, 1.1)
    (computed,) = scores(artifact, tokens(1000)).values()
    assert computed < 2 * HEADS * 1000**2 / 3


@pytest.mark.parametrize("policy", ["chunked(size=48) | clipped_softmax"])
def test_blocks_in_a_file(policy: str, tmp_path: Path) -> None:
    x, places = tokens(384), torch.arange(384)
    done = ar.optimize(Model(), policy, (x,), dynamic_shapes={})
    artifact = export_onnx(done, tmp_path / "m.onnx")
    (site,) = artifact.sites
    assert (site.form, site.skips) == ("blocks", True)
    keep = places[:, None] // 48 == places // 48
    close(torch.from_numpy(artifact.run({"x": x.numpy()})["output"]), x, keep, None)
    (computed,) = scores(artifact, x).values()
    assert computed == 2 * site.tiles[0] * site.rows**2 < 2 * HEADS * 384**2


def test_a_causal_site_stays_in_its_own_type() -> None:
    """Half of the pairs is not worth float64 tiles."""

    class Causal(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(*apart(x), is_causal=True, enable_gqa=True)

    done = ar.optimize(Causal(), "clipped_softmax", (tokens(300),), dynamic_shapes={})
    assert [s.kernel for s in done.report.sites] == ["dense"]


def operator() -> str:
    """The cascade of a window with clipped probabilities."""
    done = ar.optimize(Model(), "window(size=16) | clipped_softmax(gamma=-0.01)", (tokens(300),))
    (node,) = (n for n in done.program.graph.nodes if n.target == mapped_attention._opoverload)
    return str(node.args[4])


def test_the_gradient_is_that_of_the_dense_formula() -> None:
    text, found = operator(), []
    for function in (
        lambda y: mapped_attention(*apart(y), [], text, 16),
        lambda y: dense(y, window(90, False), -0.01),
    ):
        leaf = tokens(90).double().requires_grad_()
        function(leaf).square().sum().backward()
        found.append(leaf.grad)
    torch.testing.assert_close(*found, rtol=0, atol=1e-11)
    assert found[0].abs().max() > 0.1


def test_training_through_a_rewritten_model() -> None:
    x = tokens(300)
    done = ar.optimize(Model(), "window(size=16) | clipped_softmax(gamma=-0.01)", (x,))
    leaf = x.requires_grad_()
    done(leaf).square().sum().backward()
    assert leaf.grad.isfinite().all()
    assert leaf.grad.abs().max() > 0.1


def test_rounded_probabilities_have_no_gradient() -> None:
    x = tokens(64).requires_grad_()
    done = ar.optimize(Model(), "int8(pv=true)", (tokens(64),), dynamic_shapes={})
    with pytest.raises(RuntimeError, match="no gradient"):
        done(x).sum().backward()


def test_the_operator_is_well_formed() -> None:
    given = (*apart(tokens(33)), [], operator(), 16)
    torch.library.opcheck(mapped_attention._opoverload, given)
