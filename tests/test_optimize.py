"""`optimize` from the model to the module: numbers, signatures, state, refusals, budgets, replay."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from torch import nn

import attn_rewrite as ar
from attn_rewrite.errors import AttnRewriteError, PolicyError
from attn_rewrite.plan import Plan
from tests.spellings import CAUSAL, PLAIN
from tests.test_find_spellings import Classifier, Module

torch.manual_seed(0)


class Block(nn.Module):
    """Causal self-attention with projections, grouped heads and a residual; kwargs and a dict out."""

    def __init__(self, width: int = 32, heads: int = 4, groups: int = 2) -> None:
        super().__init__()
        self.heads, self.groups = heads, groups
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width // heads * groups)
        self.out = nn.Linear(width, width)
        self.unused = nn.Linear(3, 3)
        self.register_buffer("table", torch.ones(2), persistent=False)

    def forward(
        self, x: torch.Tensor, *, scale: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        b, s, w = x.shape
        d = w // self.heads
        q = self.q(x).view(b, s, self.heads, d).transpose(1, 2)
        k, v = self.kv(x).view(b, s, 2 * self.groups, d).transpose(1, 2).chunk(2, dim=1)
        k, v = (t.repeat_interleave(self.heads // self.groups, dim=1) for t in (k, v))
        keep = torch.ones(s, s, dtype=torch.bool, device=x.device).tril()
        p = (q @ k.mT / math.sqrt(d)).masked_fill(~keep, -math.inf).softmax(-1)
        y = self.out((p @ v).transpose(1, 2).reshape(b, s, w))
        return {"hidden": x + y if scale is None else x + scale * y}


@pytest.fixture(scope="module")
def block() -> Block:
    return Block().eval()


@pytest.fixture(scope="module")
def optimized(block: Block) -> ar.OptimizedModule:
    return ar.optimize(block, "exact", (torch.randn(2, 40, 32),))


def reference(block: Block, x: torch.Tensor, left: int | None = None) -> torch.Tensor:
    """The block in float64 by loops over rows: slow and obvious."""
    block = copy.deepcopy(block).double()
    x = x.double()
    b, s, w = x.shape
    d = w // block.heads
    q, kv = block.q(x), block.kv(x)
    out = torch.zeros(b, s, w, dtype=torch.float64)
    for n in range(b):
        for h in range(block.heads):
            g = h // (block.heads // block.groups)
            keys, values = (
                kv[n, :, g * d : (g + 1) * d],
                kv[n, :, (block.groups + g) * d : (block.groups + g + 1) * d],
            )
            for i in range(s):
                first = 0 if left is None else max(0, i - left + 1)
                scores = keys[first : i + 1] @ q[n, i, h * d : (h + 1) * d] / math.sqrt(d)
                out[n, i, h * d : (h + 1) * d] = scores.softmax(0) @ values[first : i + 1]
    return x + block.out(out)


def bound(block: Block, x: torch.Tensor, exact: torch.Tensor) -> float:
    """max(2 x the original's own error, 4 eps max|reference|)."""
    own = (block(x)["hidden"].double() - exact).abs().max().item()
    return max(2 * own, 4 * torch.finfo(x.dtype).eps * exact.abs().max().item())


@pytest.mark.parametrize("length", [1, 2, 33, 40, 129])
def test_exact_at_other_lengths(block: Block, optimized: ar.OptimizedModule, length: int) -> None:
    x = torch.randn(3, length, 32)
    exact = reference(block, x)
    with torch.no_grad():
        error = (optimized(x)["hidden"].double() - exact).abs().max().item()
        assert error <= bound(block, x, exact)


def test_window_is_a_window(block: Block) -> None:
    x = torch.randn(2, 70, 32)
    windowed = ar.optimize(block, "window(size=9)", (x,))
    exact = reference(block, x, left=9)
    with torch.no_grad():
        error = (windowed(x)["hidden"].double() - exact).abs().max().item()
    own = (block(x)["hidden"].double() - reference(block, x)).abs().max().item()
    assert error <= max(2 * own, 4 * torch.finfo(torch.float32).eps * exact.abs().max().item())
    (site,) = windowed.report.sites
    assert site.kernel == "tiled"
    assert site.unbudgeted
    assert site.approximation.cosine < 0.9999
    assert site.cost_after.tiles[0] < site.cost_after.tiles[1]


def test_module_contract(block: Block, optimized: ar.OptimizedModule) -> None:
    assert set(optimized.state_dict()) == set(block.state_dict())
    assert all(a is b for a, b in zip(optimized.parameters(), block.parameters(), strict=True))
    assert optimized.heads == 4  # an attribute of the source
    assert not optimized.training
    assert [s.name for s in optimized.sites] == [s.name for s in optimized.report.sites]
    site = optimized.sites[0]
    assert (site.kind, site.family, site.causal, site.hq, site.hkv) == (
        "self",
        "softmax",
        True,
        4,
        2,
    )
    x = torch.randn(2, 7, 32)
    with torch.no_grad():
        twin = copy.deepcopy(optimized)
        assert torch.equal(twin(x)["hidden"], optimized(x)["hidden"])
        twin.q.weight.zero_()
        assert not torch.equal(twin(x)["hidden"], optimized(x)["hidden"])
    with pytest.raises(AttnRewriteError, match="training mode was asked for"):
        optimized.train()
    assert optimized.eval() is optimized
    with pytest.raises(AttributeError):
        optimized.no_such_attribute  # noqa: B018


def test_a_model_may_have_modules_called_as_ours_are() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.plan, self.report, self.sites = Block(), nn.Linear(32, 32), nn.LayerNorm(32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.sites(self.report(self.plan(x)["hidden"]))
            return out

    torch.manual_seed(0)
    model, x = Named().eval(), torch.randn(2, 12, 32)
    done = ar.optimize(model, "exact", (x,))
    assert [site.name for site in done.sites] == ["plan#0"]
    assert [site.status for site in done.report.sites] == ["rewritten"]
    assert list(done.state_dict()) == list(model.state_dict())
    torch.testing.assert_close(done(x), model(x))
    moved = copy.deepcopy(done)
    assert moved.plan == done.plan
    expected = model(x)
    torch.testing.assert_close(moved.double()(x.double()).float(), expected)


def test_call_signature(block: Block) -> None:
    """Positional and keyword calls are the original's; what was not captured is refused by name."""
    x, scale = torch.randn(2, 12, 32), torch.tensor(0.5)
    module = ar.optimize(block, "exact", (), {"x": x, "scale": scale})
    with torch.no_grad():
        wanted = block(x, scale=scale)["hidden"]
        assert torch.allclose(module(x, scale=scale)["hidden"], wanted, atol=1e-5)
        assert torch.allclose(module(scale=scale, x=x)["hidden"], wanted, atol=1e-5)
    with pytest.raises(AttnRewriteError, match="'scale' is missing"):
        module(x)
    bare = ar.optimize(block, "exact", (x,))
    assert bare(x=x, scale=None)["hidden"].shape == x.shape
    with pytest.raises(AttnRewriteError, match="'scale' was not given"):
        bare(x, scale=scale)


def test_weights_stay_shared(block: Block) -> None:
    own = copy.deepcopy(block)
    module = ar.optimize(own, "exact", (torch.randn(2, 12, 32),))
    x = torch.randn(1, 5, 32)
    with torch.no_grad():
        module.load_state_dict({k: v * 0.5 for k, v in module.state_dict().items()})
        assert torch.allclose(module(x)["hidden"], own(x)["hidden"], atol=1e-6)


def test_moving_recaptures(block: Block) -> None:
    own = copy.deepcopy(block)
    module = ar.optimize(own, "exact", (torch.randn(2, 12, 32),))
    assert module.to("cpu") is module
    module.to(torch.float64)
    x = torch.randn(2, 9, 32, dtype=torch.float64)
    with torch.no_grad():
        assert (module(x)["hidden"] - reference(own, x)).abs().max() < 1e-13
    assert module(x)["hidden"].dtype == torch.float64
    module.half()
    assert module(x.half())["hidden"].dtype == torch.float16


def test_saved_module_refuses_to_move(block: Block, tmp_path) -> None:
    module = ar.optimize(copy.deepcopy(block), "window(size=4)", (torch.randn(2, 12, 32),))
    ar.save(module, tmp_path / "out")
    loaded = ar.load(tmp_path / "out")
    x = torch.randn(3, 17, 32)
    with torch.no_grad():
        assert torch.equal(loaded(x)["hidden"], module(x)["hidden"])
    with pytest.raises(AttnRewriteError, match="source module is not held"):
        loaded.half()


def test_budget_sends_back_to_exact(block: Block) -> None:
    x = torch.randn(2, 40, 32)
    module = ar.optimize(block, "window(size=2)", (x,), budget="cosine>=0.99999")
    (site,) = module.report.sites
    assert site.reverted
    assert site.status == "reverted"
    assert [s.text for s in module.plan] == ["exact"]
    with torch.no_grad():
        exact = reference(block, x)
        assert (module(x)["hidden"].double() - exact).abs().max().item() <= bound(block, x, exact)
    loose = ar.optimize(block, "window(size=39)", (x,), budget="cosine>=0.9")
    assert not loose.report.sites[0].reverted
    assert not loose.report.sites[0].unbudgeted


def test_end_to_end_budget(block: Block) -> None:
    x = torch.randn(2, 40, 32)
    module = ar.optimize(block, "window(size=2)", (x,), budget="end_to_end: max_abs<=1e-6")
    assert module.report.sites[0].reverted
    assert max(e.max_abs for e in module.report.end_to_end.values()) <= 1e-6


def test_plan_replays(block: Block) -> None:
    x = torch.randn(2, 40, 32)
    first = ar.optimize(block, "window(size=5, sinks=1)", (x,))
    plan = Plan.from_json(json.loads(first.plan.dumps()))
    again = ar.optimize(block, "exact", (x,), plan=plan)
    assert again.plan.hash == first.plan.hash
    with torch.no_grad():
        assert torch.equal(again(x)["hidden"], first(x)["hidden"])


def test_heads_of_one_site(block: Block) -> None:
    """A rule for some heads changes those heads and no other."""
    policy = ar.Policy([ar.Rule(ar.Where(heads=[1]), "window(size=3)")])
    x = torch.randn(1, 30, 32)
    module = ar.optimize(block, policy, (x,))
    with torch.no_grad():
        changed = (
            torch.linalg.pinv(block.out.weight) @ (module(x)["hidden"] - block(x)["hidden"])[0].T
        )
    by_head = changed.view(4, 8, 30).abs().amax((1, 2))
    assert by_head[1] > 1e-3
    assert by_head[[0, 2, 3]].max() < 1e-4


def test_nothing_found_is_said() -> None:
    module = ar.optimize(Classifier().eval(), "exact", (torch.randn(2, 3, 8),))
    assert module.sites == ()
    assert [r.code for r in module.report.refusals] == [
        "probabilities-escape"
    ] or module.report.refusals
    x = torch.randn(4, 2, 8)
    assert module(x).shape == (4, 2, 10)


@pytest.mark.parametrize("option", [{"backend": "nvcc"}, {"calibration": "x"}])
def test_unknown_options(block: Block, option: dict) -> None:
    with pytest.raises(PolicyError):
        ar.optimize(block, "exact", (torch.randn(1, 4, 32),), **option)


@pytest.mark.parametrize("name", [*PLAIN, *CAUSAL])
def test_every_spelling_is_rewritten_exactly(name: str) -> None:
    """Each spelling, rewritten and verified: no softmax of the author is left in the graph."""
    function = {**PLAIN, **CAUSAL}[name]
    args = tuple(torch.randn(2, 4, 20, 8) for _ in range(3))
    module = ar.optimize(Module(function).eval(), "exact", args)
    (site,) = module.report.sites
    assert site.kernel in ("sdpa", "tiled")
    assert site.implementation.max_abs <= site.implementation_bound
    left = [
        n
        for n in module.graph_module.graph.nodes
        if "softmax" in str(n.target) or "exp.default" in str(n.target)
    ]
    assert left == []


@pytest.mark.parametrize("policy", ["exact", "window(size=3)"])
def test_nothing_of_a_replaced_site_is_left(policy: str) -> None:
    """The original attention does not run beside the kernel."""
    args = tuple(torch.randn(2, 4, 20, 8) for _ in range(3))
    for name in ("sdpa", "sdpa_causal", "upcast", "eval_dropout"):
        function = {**PLAIN, **CAUSAL}[name]
        module = ar.optimize(Module(function).eval(), policy, args)
        nodes = [n for n in module.graph_module.graph.nodes if n.op == "call_function"]
        assert all(n.users for n in nodes), name


def test_narrow_windows_of_long_inputs_verify() -> None:
    """Few keys per row round more than many: the bound is that of the rewritten attention."""
    for seed in range(4):
        torch.manual_seed(seed)
        args = tuple(torch.randn(2, 4, 512, 16) for _ in range(3))
        module = ar.optimize(Module(PLAIN["sdpa"]).eval(), "window(size=65, sinks=1)", args)
        site = module.report.sites[0]
        assert site.implementation.max_abs <= site.implementation_bound


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision(dtype: torch.dtype) -> None:
    args = tuple(torch.randn(2, 4, 20, 8, dtype=dtype) for _ in range(3))
    module = ar.optimize(Module(PLAIN["upcast"]).eval(), "exact", args)
    site = module.report.sites[0]
    assert site.implementation.max_abs <= site.implementation_bound
    assert module(*args).dtype == dtype


def test_large_scores_and_masked_rows() -> None:
    """Scores of +-1e4, a row whose keys are all masked by finfo.min (mean of V), one by -inf (NaN)."""

    def attend(q, k, v, keep):
        bias = torch.where(keep, 0.0, torch.finfo(q.dtype).min)
        return (q @ k.mT + bias).softmax(-1) @ v

    q, k, v = (torch.randn(1, 2, 6, 8) * 60 for _ in range(3))
    keep = torch.ones(1, 1, 6, 6, dtype=torch.bool)
    keep[..., 2, :] = False
    module = ar.optimize(Module(attend).eval(), "exact", (q, k, v, keep))
    result = module(q, k, v, keep)
    assert torch.allclose(result[:, :, 2], v.mean(2), rtol=1e-5, atol=1e-4)
    assert (result - attend(q, k, v, keep)).abs().max() < 1e-3


# Exported programs


def exported(length: int = 16) -> tuple[torch.export.ExportedProgram, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(2, length, 32)
    shapes = {"x": {1: torch.export.Dim("length", min=4, max=200)}}
    return torch.export.export(Packed().eval(), (x,), dynamic_shapes=shapes), x


class Packed(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = torch.nn.Linear(32, 96)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 4, 8).permute(2, 0, 3, 1, 4)
        p = (q @ k.transpose(-1, -2) * 8**-0.5).softmax(-1)
        return {"y": (p @ v).transpose(1, 2).flatten(2)}


def test_a_program_is_taken_as_it_is() -> None:
    program, x = exported()
    assert len(ar.find_attention(program).sites) == 1
    optimized = ar.optimize(program, "exact")
    assert optimized.report.sites[0].status == "rewritten"
    assert "x: dimension 1 (up to 200) is dynamic" in optimized.report.notes
    long = torch.randn(2, 150, 32)
    with torch.no_grad():
        for value in (x, long):
            torch.testing.assert_close(optimized(value)["y"], program.module()(value)["y"])
    with pytest.raises(ar.CaptureError, match="dynamic_shapes was given with an exported program"):
        ar.optimize(program, "exact", (x,), dynamic_shapes={"x": {}})
    with pytest.raises(ar.CaptureError, match=r"takes others|do not fit"):
        ar.optimize(program, "exact", (x, x))


def test_other_sizes_than_captured_are_one_sentence() -> None:
    program, _ = exported()
    optimized = ar.optimize(program, "exact", verify=False)
    with pytest.raises(ar.AttnRewriteError, match=r"graph, which needs x.size\(\)\[0\] == 2; "):
        optimized(torch.randn(3, 16, 32))


def test_a_model_without_attention_says_so() -> None:
    optimized = ar.optimize(torch.nn.Linear(4, 4).eval(), "exact", (torch.randn(2, 4),))
    assert "no attention was found (0 near misses" in str(optimized.report)


def test_measuring_changes_no_buffer() -> None:
    """Running statistics are those of the user's calls, and every run of a comparison starts from
    the same ones."""

    class Normed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = torch.nn.BatchNorm1d(4)

        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            out = (q @ k.mT).softmax(-1) @ v
            shape = out.shape
            return (
                self.norm(out.flatten(2)).view(shape) + self.norm.running_mean[None, :, None, None]
            )

    torch.manual_seed(0)
    args = tuple(torch.randn(3, 4, 6, 8) for _ in range(3))
    model, other = Normed().train(), Normed().train()
    run = ar.optimize(model, "window(size=2)", args)
    for found, wanted in zip(model.buffers(), other.buffers(), strict=True):
        assert torch.equal(found, wanted)
    exact = ar.optimize(model, "exact", args)
    assert all(e.max_abs < 1e-5 for e in exact.report.end_to_end.values())
    assert run.report.sites[0].approximation is not None
    torch.testing.assert_close(exact(*args), other(*args))
    assert int(model.norm.num_batches_tracked) == 1
