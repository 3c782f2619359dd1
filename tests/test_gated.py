"""Gates on heads: identity at first, a hand-written reference, training, saving, refusals."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from torch import nn
from torch.nn import functional

import attn_rewrite as ar
from attn_rewrite.cli import app, verify
from attn_rewrite.errors import PolicyError, VerifyError
from attn_rewrite.gates import named_gates
from attn_rewrite.passes.quantize.gated import Gated
from tests.command import attn_rewrite
from tests.sites import make_site

HEADS, WIDTH = 4, 24


class Attention(nn.Module):
    """Attention whose gates, if it has some, are written out by hand."""

    def __init__(self, hkv=HEADS, norm=False, cross=False):
        super().__init__()
        self.hkv, self.cross = hkv, cross
        d = WIDTH // HEADS
        self.q, self.k, self.v = (nn.Linear(WIDTH, h * d) for h in (HEADS, hkv, hkv))
        self.out = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(d) if norm else nn.Identity()

    def heads(self, x, y):
        d = WIDTH // HEADS
        q = self.norm(self.q(x).view(*x.shape[:2], HEADS, d)).transpose(1, 2)
        k, v = (f(y).view(*y.shape[:2], self.hkv, d).transpose(1, 2) for f in (self.k, self.v))
        return functional.scaled_dot_product_attention(q, k, v, enable_gqa=self.hkv < HEADS)

    def forward(self, x, y=None):
        found = self.heads(x, x if y is None else y)
        return self.out(found.transpose(1, 2).reshape(*x.shape[:2], WIDTH))


def gated_by_hand(model, gates, kind, x, y=None, only=range(HEADS), scale=4.0):
    """The model with the gates of a rewritten one, in float64, head by head."""
    wide = copy.deepcopy(model).double()
    x = x.double()
    found = wide.heads(x, x if y is None else y.double())
    g = {n.rpartition("_0_")[2]: p.detach().double() for n, p in gates}
    for h in only:
        mine = x if kind == "all" else x.view(*x.shape[:2], HEADS, -1)[:, :, h]
        if kind == "mlp":
            mine = torch.relu(mine @ g["hidden_weight"][h] + g["hidden_bias"][h])
        gate = torch.sigmoid(mine @ g["weight"][h] + g["bias"][h]) * scale
        found[:, h] = found[:, h] * gate[..., None]
    return wide.out(found.transpose(1, 2).reshape(*x.shape[:2], WIDTH))


def shaken(run, seed=0):
    """Gates with numbers in them."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, gate in named_gates(run):
            gate.add_(torch.randn(gate.shape, generator=g))
    return run


X = torch.randn(2, 7, WIDTH, generator=torch.Generator().manual_seed(1))
Y = torch.randn(2, 9, WIDTH, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(
    ("kind", "hkv", "cross"), [("head", 2, True), ("mlp", HEADS, False), ("all", 2, False)]
)
def test_gates_by_hand(kind, hkv, cross):
    """The gate sees what the queries come from, also beside keys of another sequence."""
    torch.manual_seed(0)
    model = Attention(hkv, norm=True, cross=cross).eval()
    args = (X, Y) if cross else (X,)
    run = ar.optimize(model, f"gated(kind='{kind}')", args)
    (error,) = run.report.end_to_end.values()
    assert error.max_abs <= 2e-6
    shaken(run)
    wanted = gated_by_hand(model, named_gates(run), kind, *args)
    assert torch.allclose(run(*args).double(), wanted, atol=2e-5)
    assert not torch.allclose(run(*args), model(*args), atol=1e-2)


@pytest.mark.parametrize(("pi", "identity"), [(0.9, True), (0.25, False)])
def test_what_a_gate_begins_with(pi, identity):
    model = Attention().eval()
    run = ar.optimize(model, f"gated(pi={pi}, identity={str(identity).lower()})", (X,))
    gates = {n.rpartition("_")[2]: p for n, p in named_gates(run)}
    assert torch.equal(gates["weight"], torch.zeros(HEADS, WIDTH // HEADS))
    assert torch.allclose(gates["bias"], torch.full((HEADS,), math.log(pi / (1 - pi))))
    factor = 1.0 if identity else pi
    plain = model.out.bias
    assert torch.allclose(run(X) - plain, (model(X) - plain) * factor, atol=1e-6)
    assert "end-to-end" in " ".join(run.report.notes)


def test_some_heads_and_a_rest_that_is_quantised():
    torch.manual_seed(0)
    model = Attention().eval()
    rules = [
        ar.Rule(ar.Where(heads=(1, 2)), "gated | int8"), ar.Rule(apply="int8"),
    ]  # fmt: skip
    run = shaken(ar.optimize(model, ar.Policy(rules), (X,)))
    wanted = gated_by_hand(model, named_gates(run), "head", X, only=(1, 2))
    error = (run(X).double() - wanted).abs().max()
    assert 0 < error < 2e-2  # that of 8 bits
    exact = ar.optimize(model, ar.Policy([ar.Rule(ar.Where(heads=(1, 2)), "gated")]), (X,))
    exact.load_state_dict(run.state_dict())
    assert torch.allclose(exact(X).double(), wanted, atol=2e-5)


def test_gates_are_trained_saved_and_loaded(tmp_path):
    torch.manual_seed(0)
    model = Attention().eval()
    run = ar.optimize(model, "gated(kind='mlp') | int8", (X,))
    names = {n for n, _ in named_gates(run)}
    assert len(names) == 4
    assert names == set(run.state_dict()) - set(model.state_dict())
    optimizer = torch.optim.SGD([p for _, p in named_gates(run)], 0.5)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = run(X).square().mean()
        loss.backward()
        assert all(p.grad is not None for _, p in named_gates(run))
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    wanted = run(X)
    ar.save(run, tmp_path / "saved")
    loaded = ar.load(tmp_path / "saved")
    assert {n for n, _ in named_gates(loaded)} == names
    assert torch.allclose(loaded(X), wanted, atol=1e-6)
    assert torch.equal(copy.deepcopy(run)(X), wanted)
    again = ar.optimize(model, "exact", (X,), plan=run.plan)
    again.load_state_dict(run.state_dict())
    assert torch.equal(again(X), wanted)
    run.double()  # captured and rewritten again: what was learned stays
    assert torch.allclose(run(X.double()).float(), wanted, atol=2e-2)
    assert {p.dtype for _, p in named_gates(run)} == {torch.float64}


def test_calibration_gates_the_heads_that_fall_out_too():
    torch.manual_seed(0)
    model = Attention().eval()
    with torch.no_grad():
        model.k.weight[:12] *= 60
    calls = [torch.randn(1, 30, WIDTH) for _ in range(4)]
    policy = "gated | int8"
    run = ar.optimize(model, policy, (X,), calibration=calls, budget="cosine>=0.9999")
    assert {s.text for s in run.plan.steps} == {"gated", "gated | int8"}
    assert [n.rpartition("_")[2] for n, _ in named_gates(run)] == ["weight", "bias"]
    wanted = gated_by_hand(model, named_gates(shaken(run)), "head", X)
    assert (run(X).double() - wanted).abs().max() < 2e-2


class Raw(nn.Module):
    def forward(self, q, k, v):
        return functional.scaled_dot_product_attention(q, k, v)


def test_refusals():
    q = torch.randn(2, HEADS, 7, 8)
    (site,) = ar.optimize(Raw(), "gated", (q, q, q)).report.sites
    assert [r.code for r in site.refusals] == ["gated-input"]
    assert "projected from no activation" in site.refusals[0].reason
    assert Gated().admits(make_site()).code == "gated-input"
    with pytest.raises(PolicyError, match="just in time"):
        ar.optimize(Attention(), "gated")
    with pytest.raises(PolicyError, match=r"pi is 1\.0"):
        ar.Policy.parse("gated(pi=1.0)")


class Torch(nn.Module):
    """Tokens before the batch, inside."""

    def __init__(self):
        super().__init__()
        self.inner = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    def forward(self, x):
        return self.inner(x, x, x, need_weights=False)[0]


@pytest.mark.parametrize("length", [7, 2])
def test_tokens_before_the_batch(length):
    """Also where both have one size."""
    torch.manual_seed(0)
    model = Torch().eval()
    x = torch.randn(2, length, WIDTH)
    run = shaken(ar.optimize(model, "gated(kind='all')", (x,)))
    assert not run.report.sites[0].refusals
    (weight, bias) = (p for _, p in named_gates(run))
    gate = torch.sigmoid(x @ weight.T + bias) * 4
    q, k, v = model.inner.in_proj_weight.chunk(3)
    parts = [(x @ w.T + 0).view(2, length, HEADS, -1).transpose(1, 2) for w in (q, k, v)]
    found = functional.scaled_dot_product_attention(*parts) * gate.transpose(1, 2)[..., None]
    wanted = model.inner.out_proj(found.transpose(1, 2).reshape(2, length, WIDTH))
    assert torch.allclose(run(x), wanted, atol=1e-5)


@pytest.mark.parametrize("make", ["gpt2", "llama", "swin"])
def test_models_of_libraries(make):
    """One projection for all three, rotary embedding, and windows in the batch."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    common = {"vocab_size": 32, "num_hidden_layers": 1, "hidden_size": 32}
    if make == "gpt2":
        config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=32)
        model, args = transformers.GPT2Model(config), (torch.randint(0, 32, (2, 7)),)
    elif make == "llama":
        config = transformers.LlamaConfig(
            **common, num_attention_heads=4, num_key_value_heads=2, intermediate_size=32
        )
        model, args = transformers.LlamaModel(config), (torch.randint(0, 32, (2, 7)),)
    else:
        config = transformers.SwinConfig(
            image_size=32, patch_size=4, embed_dim=16, depths=[2], num_heads=[2], window_size=4
        )
        model, args = transformers.SwinModel(config), (torch.randn(2, 3, 32, 32),)
    run = ar.optimize(model.eval(), "gated", args, {})
    sites = run.report.sites
    assert [s.refusals for s in sites] == [()] * len(sites)
    before = run(*args)[0]
    assert torch.allclose(before, model(*args)[0], atol=1e-5)
    assert not torch.allclose(shaken(run)(*args)[0], before, atol=1e-3)


# The command, on a result whose gates were trained


def make_model():
    torch.manual_seed(0)
    return Attention(hkv=2).eval(), (X,), {}, None


NAMED = "tests.test_gated:make_model"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder that the command wrote, saved again with gates that were trained."""
    folder = tmp_path_factory.mktemp("gates")
    made = attn_rewrite("optimize", NAMED, "--policy", "gated(kind='mlp')", "-o", folder / "made")
    assert made.code == 0, made.err
    run = ar.load(folder / "made")
    optimizer = torch.optim.SGD([p for _, p in named_gates(run)], 10.0)
    for _ in range(3):
        optimizer.zero_grad()
        run(X).square().mean().backward()
        optimizer.step()
    ar.save(run, folder / "trained")
    return run, folder / "trained"


def test_verify_takes_trained_gates_from_the_saved_result(trained, capfd):
    """The original has none; the bound is that of the rewritten model with these gates."""
    run, folder = trained
    model = make_model()[0]
    wanted = gated_by_hand(model, named_gates(run), "mlp", X)
    assert (run(X) - model(X)).abs().max() > 1e-2, "training changed something"
    assert (run(X).double() - wanted).abs().max() < 1e-5
    assert app.run(["verify", str(folder), "--original", NAMED, "--json"]) == 0
    document = json.loads(capfd.readouterr().out)
    assert set(document["errors"]) == {"model.pt2"}
    (error,) = document["errors"]["model.pt2"].values()
    (allowed,) = document["bounds"].values()
    assert error <= allowed < 1e-4


def test_verify_finds_gates_that_are_not_applied_as_saved(trained, monkeypatch, capfd):
    """Outputs of other gates than those that are saved."""
    outputs = verify._outputs

    def other(saved, loaded):
        with torch.no_grad():
            next(p for n, p in named_gates(saved) if n.endswith("_weight")).mul_(0.99)
        return outputs(saved, loaded)

    monkeypatch.setattr(verify, "_outputs", other)
    words = ["verify", str(trained[1]), "--original", NAMED, "--json"]
    assert app.run(words) == VerifyError.exit_code
    assert "model.pt2" in capfd.readouterr().err
