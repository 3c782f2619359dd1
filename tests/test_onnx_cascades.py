"""Every named cascade that a model can contain, as a site of a model, in a file that agrees.

What no kernel here computes with less work is left as it is, and the file says so; what a policy
rewrites to a cascade that is no softmax attention leaves as a function with the cascade's text.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attn_rewrite as ar
from attn_rewrite import export_onnx
from attn_rewrite.errors import LowerError
from tests.mixed_spellings import LENGTH, TALKING, WIDTH, Heads

N, D = LENGTH, 4
AT = torch.arange(N)
AHEAD = AT[:, None] - AT


def product(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.mT / math.sqrt(D)


def attend(score: Tensor, v: Tensor, keep: Tensor | None = None) -> Tensor:
    score = score if keep is None else score.masked_fill(~keep, -math.inf)
    return score.softmax(-1) @ v


def unstable(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    e = product(q, k).exp()
    return (e / e.sum(-1, keepdim=True)) @ v


def sink(score: Tensor, v: Tensor, logit: float) -> Tensor:
    column = torch.full_like(score[..., :1], logit)
    return torch.cat((score, column), -1).softmax(-1)[..., :-1] @ v


def unit(x: Tensor) -> Tensor:
    return x / (x * x).sum(-1, keepdim=True).sqrt()


def normalised(a: Tensor) -> Tensor:
    return a / (a.sum(-1, keepdim=True) + 1e-6)


Map = Callable[[Tensor], Tensor]


def newton(x: Tensor, value: Map, slope: Map) -> Tensor:
    tau = x.amax(-1, keepdim=True) - 1
    for _ in range(8):
        r = x - tau
        tau = tau + (value(r).sum(-1, keepdim=True) - 1) / slope(r).sum(-1, keepdim=True)
    return value(x - tau)


def sparsemax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return newton(product(q, k), torch.relu, lambda r: (r > 0).to(r.dtype)) @ v


def entmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Of alpha 1.5: squares of half the score above a threshold."""
    return newton(product(q, k) / 2, lambda r: r.relu() ** 2, lambda r: 2 * r.relu()) @ v


def features(x: Tensor) -> Tensor:
    return F.elu(x) + 1


def linear(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k = features(q), features(k)
    return (q @ (k.mT @ v)) / (q @ k.sum(-2).unsqueeze(-1))


def linear_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k = features(q), features(k)
    state = (k.unsqueeze(-1) * v.unsqueeze(-2)).cumsum(-3)
    above = (q.unsqueeze(-2) @ state).squeeze(-2)
    return above / (q * k.cumsum(-2)).sum(-1, keepdim=True)


def stick(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = product(q, k)
    rest = F.logsigmoid(-s).masked_fill(AHEAD < 0, 0.0)
    after = rest.flip(-1).cumsum(-1).flip(-1) - rest
    return ((F.logsigmoid(s) + after).exp() * (AHEAD >= 0)) @ v


def over_queries(q: Tensor, k: Tensor) -> Tensor:
    return product(q, k).softmax(-2)


def differential(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    (q1, q2), (k1, k2) = q.chunk(2, -1), k.chunk(2, -1)
    return (product(q1, k1).softmax(-1) - 0.3 * product(q2, k2).softmax(-1)) @ v


def mixed(maps: Tensor) -> Tensor:
    weights = torch.linspace(-1, 1, 16).view(4, 4)
    return torch.einsum("gh,bhqk->bgqk", weights.to(maps.dtype), maps)


def rounded(q: Tensor, k: Tensor, v: Tensor, by_row: bool) -> Tensor:
    p = product(q, k).softmax(-1)
    top = p.amax(-1, keepdim=True) if by_row else torch.ones_like(p[..., :1])
    return (torch.round(p * 127 / top) @ v) * top / 127


def merged(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Two shares of the keys, joined by their log-sum-exp."""
    parts = [(product(q, a), b) for a, b in zip(k.chunk(2, -2), v.chunk(2, -2), strict=True)]
    lse = torch.stack([s.logsumexp(-1, keepdim=True) for s, _ in parts])
    outs = torch.stack([attend(s, b) for s, b in parts])
    return (lse.softmax(0) * outs).sum(0)


def blocks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    table = torch.tensor([[True, False, True], [False, True, True], [True, True, False]])
    return attend(product(q, k), v, table[AT // 2][:, AT // 2])


def biased(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    table = torch.linspace(-1, 1, 2 * N - 1).to(q.dtype)
    return attend(product(q, k) + table[AT - AT[:, None] + N - 1], v)


def urpe(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    table = torch.linspace(0.5, 1.5, 2 * N - 1).to(q.dtype)
    return (product(q, k).softmax(-1) * table[AT - AT[:, None] + N - 1]) @ v


Attend = Callable[[Tensor, Tensor, Tensor], Any]
MODELS: dict[str, Attend] = {
    "attention-3pass": lambda q, k, v: attend(product(q, k), v),
    "attention-unstable": unstable,
    "causal": lambda q, k, v: attend(product(q, k), v, AHEAD >= 0),
    "window": lambda q, k, v: attend(product(q, k), v, (AHEAD >= 0) & (AHEAD < 3)),
    "window-with-sinks": lambda q, k, v: attend(
        product(q, k), v, (AHEAD >= 0) & ((AHEAD < 2) | (AT < 1))
    ),
    "block-sparse": blocks,
    "scaled": lambda q, k, v: attend(q @ k.mT / math.sqrt(D), v),
    "alibi": lambda q, k, v: attend(
        product(q, k) - torch.tensor([0.5, 0.25, 0.1, 0.05]).view(4, 1, 1) * AHEAD.abs(), v
    ),
    "relative-bias": biased,
    "softcap": lambda q, k, v: attend(5 * torch.tanh(product(q, k) / 5), v),
    "qk-norm": lambda q, k, v: attend(3 * unit(q) @ unit(k).mT, v),
    "grouped-queries": lambda q, k, v: attend(
        product(q, k[:, :2].repeat_interleave(2, 1)), v[:, :2].repeat_interleave(2, 1)
    ),
    "softmax1": lambda q, k, v: sink(product(q, k), v, 0.0),
    "sink": lambda q, k, v: sink(product(q, k), v, 0.7),
    "sigmoid": lambda q, k, v: torch.sigmoid(product(q, k) - math.log(N)) @ v,
    "relu-power": lambda q, k, v: (product(q, k).relu() ** 2) @ v,
    "relu-power-normalised": lambda q, k, v: normalised(product(q, k).relu() ** 2) @ v,
    "gated": lambda q, k, v: attend(product(q, k), v) * torch.sigmoid(q),
    "urpe": urpe,
    "dropout": lambda q, k, v: F.dropout(product(q, k).softmax(-1), 0.1, training=False) @ v,
    "differential": differential,
    "talking-heads": lambda q, k, v: mixed(product(q, k).softmax(-1)) @ v,
    "talking-heads-before-softmax": lambda q, k, v: mixed(product(q, k)).softmax(-1) @ v,
    "clipped-softmax": lambda q, k, v: (1.06 * product(q, k).softmax(-1) - 0.03).clip(0, 1) @ v,
    "sparsemax": sparsemax,
    "entmax": entmax,
    "linear-attention": linear,
    "linear-attention-causal": linear_causal,
    "stick-breaking": stick,
    "softmax-over-queries": lambda q, k, v: over_queries(q, k) @ v,
    "slot-attention": lambda q, k, v: normalised(over_queries(q, k)) @ v,
    "quantised-p": lambda q, k, v: rounded(q, k, v, False),
    "quantised-p-row-scale": lambda q, k, v: rounded(q, k, v, True),
    "attention-weights": lambda q, k, v: (attend(product(q, k), v), product(q, k).softmax(-1)),
    "log-probabilities": lambda q, k, v: product(q, k).log_softmax(-1),
    "lse": lambda q, k, v: (attend(product(q, k), v), product(q, k).logsumexp(-1)),
    "lse-merge": merged,
}  # fmt: skip
# Other ways of computing one of the above, which a model's graph does not distinguish; sums that
# show a rule and are no attention; and codes, which a policy makes (`test_onnx_coded`).
SAME = {
    "attention-3pass-deferred", "attention-2pass", "attention-2pass-deferred", "attention-1pass",
    "attention-unstable-deferred", "stick-breaking-1pass", "dependent-sums",
    "dependent-sums-deferred", "dependent-sums-iterative", "quantised-qkv",
}  # fmt: skip
# Rounding turns an error of the last bit into one of a whole step, 1 / 127 of a probability.
STEPS = ("quantised-p", "quantised-p-row-scale")
LEFT = ("talking-heads", "differential")


class One(nn.Module):
    """An attention by name, with projections of its own."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.qkv = name, nn.Linear(16, 48)

    def forward(self, x: Tensor) -> Any:
        q, k, v = self.qkv(x).view(x.shape[0], N, 3, 4, D).permute(2, 0, 3, 1, 4)
        return MODELS[self.name](q, k, v)


class All(nn.Module):
    """Every attention side by side, so that one export has them all."""

    def __init__(self) -> None:
        super().__init__()
        self.named = nn.ModuleDict({name: One(name) for name in MODELS})

    def forward(self, x: Tensor) -> dict[str, Any]:
        return {name: site(x) for name, site in self.named.items()}


@pytest.fixture(scope="module", autouse=True)
def translations_read_once() -> Iterator[None]:
    """torch reads its 500 translations anew at every export, a third of the time of a small one."""
    import onnxscript._framework_apis.torch_2_5 as apis

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(apis, "get_torchlib_ops", functools.cache(apis.get_torchlib_ops))
        yield


def test_every_named_cascade_is_here() -> None:
    assert set(MODELS) | SAME == set(ar.cascade.NAMED)
    assert not set(MODELS) & SAME


@pytest.mark.parametrize(
    "target",
    [
        pytest.param("portable", marks=pytest.mark.slow),
        pytest.param("onnxruntime", marks=pytest.mark.matrix),
    ],
)
def test_models_of_every_cascade_agree(target: str, tmp_path: Path) -> None:
    """The export compares with the program; here the file is compared with the model itself."""
    torch.manual_seed(0)
    model, x = All().eval(), torch.randn(2, N, 16)
    done = ar.optimize(model, "exact", (x,), dynamic_shapes={})
    artifact = export_onnx(done, tmp_path / "m.onnx", target=target)
    with torch.no_grad():
        wide = model.double()(x.double())
    flat = [
        (name, t) for name, out in wide.items() for t in (out if isinstance(out, tuple) else (out,))
    ]
    got = artifact.run({"x": x.numpy()})
    assert len(got) == len(flat)
    for (name, wanted), found in zip(flat, got.values(), strict=True):
        bound = 0.05 if name in STEPS else 1e-5
        assert np.abs(found - wanted.numpy()).max() <= bound * wanted.abs().max().item(), name
    sites = {s.name: s for s in artifact.sites}
    for report in done.report.sites:
        if report.kernel is None and report.refusals:
            assert sites[report.name].form == "operators", report.name
            assert sites[report.name].detail.startswith("left as it is: "), report.name
    for name in LEFT:
        (site,) = [s for s in artifact.sites if s.name.startswith(f"named.{name}#")]
        assert not site.skips
        assert "left as it is: " in site.detail


@pytest.mark.slow
@pytest.mark.parametrize("target", ["portable", "onnxruntime"])
@pytest.mark.parametrize("kind", TALKING, ids=lambda k: k.__name__)
def test_talking_heads_in_every_spelling(kind: type[Heads], target: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = kind().eval(), torch.randn(2, LENGTH, WIDTH)
    done = ar.optimize(model, "exact", (x,), dynamic_shapes={})
    artifact = export_onnx(done, tmp_path / "m.onnx", target=target)
    (site,) = artifact.sites
    assert (site.name, site.form, site.skips) == (done.sites[0].name, "operators", False)
    with torch.no_grad():
        wanted = model.double()(x.double()).numpy()
    artifact.verify({"x": x.numpy()}, {"output": wanted}, bound={"output": 1e-5})


class Tokens(nn.Module):
    """Attention over tokens of any number."""

    def __init__(self, causal: bool = False) -> None:
        super().__init__()
        self.causal, self.qkv = causal, nn.Linear(16, 48)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, D)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return out.transpose(1, 2).flatten(2)


@pytest.mark.parametrize("free", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_combiner_is_a_function_with_the_text_of_its_cascade(free: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Tokens(True).eval(), torch.randn(2, 96, 16)
    shapes = None if free else {"x": {0: torch.export.Dim("n", max=64)}}
    done = ar.optimize(model, "combiner(segment=8)", (x,), dynamic_shapes=shapes)
    artifact = export_onnx(done, tmp_path / "m.onnx")
    (site,) = artifact.sites
    assert (site.name, site.form, site.skips) == (done.sites[0].name, "einsums", True)
    file = onnx.load(artifact.path)
    onnx.checker.check_model(file, full_check=True)
    (function,) = file.functions
    (call,) = [n for n in file.graph.node if n.domain == "attn_rewrite"]
    assert call.op_type == function.name
    cascade = ar.cascade.parse(function.doc_string)
    assert cascade.name == "combiner"
    assert not {n.op_type for n in file.graph.node} & {"Exp", "Softmax", "Einsum"}
    for batch, length in ((1, 96), (3, 61), (2, 200)) if free else ((1, 96), (3, 96)):
        x = torch.randn(batch, length, 16)
        with torch.no_grad():
            wanted = done(x).numpy()
        error = np.abs(artifact.run({"x": x.numpy()})["output"] - wanted).max()
        assert error <= 1e-5


def test_two_sites_are_two_functions(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layers = nn.Sequential(Tokens(), nn.Linear(16, 16), Tokens(True))
    model, x = layers.eval(), torch.randn(2, 40, 16)
    done = ar.optimize(model, "combiner(segment=8)", (x,), dynamic_shapes={})
    artifact = export_onnx(done, tmp_path / "m.onnx", target="onnxruntime")
    assert [s.form for s in artifact.sites] == ["einsums"] * 2
    assert [s.name for s in artifact.sites] == [s.name for s in done.sites]
    file = onnx.load(artifact.path)
    assert len({f.name for f in file.functions}) == len(file.functions) == 2
    with torch.no_grad():
        wanted = done(x).numpy()
    assert np.abs(artifact.run({"input": x.numpy()})["output"] - wanted).max() <= 1e-5


def test_clipped_probabilities_under_a_mask_are_no_dense_mask(tmp_path: Path) -> None:
    """Where no block is left out there are no tiles of them, and that is said."""
    model, x = Tokens().eval(), torch.randn(2, 40, 16)
    done = ar.optimize(model, "window(size=16) | clipped_softmax", (x,), dynamic_shapes={})
    with pytest.raises(LowerError) as caught:
        export_onnx(done, tmp_path / "m.onnx")
    assert caught.value.refusals[0].code == "onnx-dense-mask"
    assert not list(tmp_path.iterdir())
    plain = ar.optimize(model, "clipped_softmax", (x,), dynamic_shapes={})
    (site,) = export_onnx(plain, tmp_path / "m.onnx").sites
    assert site.form == "dense"
