"""Plans: which rule wins where, what is refused, and replay from JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from attn_rewrite.cascade.attention import as_softmax, score_of
from attn_rewrite.cascade.expr import KV, Q, call, conjuncts, eq
from attn_rewrite.cascade.oracle import interpret
from attn_rewrite.cascade.text import parse_expr
from attn_rewrite.errors import PolicyError
from attn_rewrite.passes import TRANSFORMS
from attn_rewrite.passes.keep import Exact, Keep
from attn_rewrite.passes.sparse.window import Window
from attn_rewrite.passes.transform import Exactness, ScoreEdit, SparsePattern, Transform
from attn_rewrite.plan import Plan, Step, length_bounds, make_plan, rewritten
from attn_rewrite.plan_checks import check_sites
from attn_rewrite.policy import Policy, Rule, Where
from attn_rewrite.site import Refusal
from tests.sites import findings, make_site

ENCODER = [make_site(f"encoder.{i}.attn#0") for i in range(3)]
DECODER = [make_site(f"decoder.{i}.attn#0", causal=True) for i in range(2)]
CROSS = make_site("decoder.0.cross#0", kind="cross")


def plan_of(policy, *sites):
    return make_plan(findings(*sites), policy)


def texts(plan):
    return {(s.site, s.heads): s.text for s in plan}


def test_one_pipeline_for_every_site():
    plan = plan_of(Policy.parse("window(8) | exact"), *ENCODER)
    assert [s.site for s in plan] == [s.name for s in ENCODER]
    assert {s.text for s in plan} == {"window(size=8) | exact"}
    assert {s.exactness for s in plan} == {Exactness.APPROXIMATE}
    assert plan.refusals == ()


def test_exact_changes_nothing_and_keep_keeps():
    plan = plan_of(Policy.parse("exact"), ENCODER[0])
    assert not plan.steps[0].keeps
    assert plan.steps[0].exactness == "exact"
    assert rewritten(ENCODER[0], *plan) is ENCODER[0].cascade
    assert plan_of(Policy.parse("keep"), ENCODER[0]).steps[0].keeps


def test_the_first_rule_that_matches_wins():
    policy = Policy(
        [
            Rule(Where("encoder.1"), "window(2)"),
            Rule(Where(causal=True), "exact"),
            Rule(Where("encoder.*"), "window(4)"),
        ]
    )
    plan = plan_of(policy, *ENCODER, *DECODER, make_site("pooler#0", kind="pooling"))
    found = {site: text for (site, _), text in texts(plan).items()}
    assert found == {
        "encoder.0.attn#0": "window(size=4)",
        "encoder.1.attn#0": "window(size=2)",
        "encoder.2.attn#0": "window(size=4)",
        "decoder.0.attn#0": "exact",
        "decoder.1.attn#0": "exact",
        "pooler#0": "keep",
    }
    assert plan.of("pooler#0")[0].note == "no rule matches"


def test_heads_of_one_site_may_differ():
    policy = Policy(
        [Rule(Where(heads="0"), "window(1)"), Rule(Where(heads="0-2"), "window(3)")],
    )
    site = DECODER[0]
    plan = plan_of(policy, site)
    assert texts(plan) == {
        (site.name, (0,)): "window(size=1)",
        (site.name, (1, 2)): "window(size=3)",
        (site.name, (3,)): "keep",
    }
    assert "computed exactly" in plan.steps[2].note
    # Equal values in every head show which keys each one averages.
    count = torch.arange(8, dtype=torch.float64).expand(1, 4, 8).unsqueeze(-1)
    inputs = {"Q": torch.zeros(1, 4, 8, 2), "K": torch.zeros(1, 4, 8, 2), "V": count}
    last = interpret(rewritten(site, *plan), inputs)["AV"][0, :, -1, 0]
    assert last.tolist() == pytest.approx([7, 6, 6, 3.5])


def test_a_rule_for_all_heads_in_parts_is_one_pipeline():
    policy = Policy([Rule(Where(heads="0-3"), "window(3)")])
    assert plan_of(policy, ENCODER[0]).steps[0].heads is None


@dataclass(frozen=True)
class Uniform(Transform):
    """A transform that knows nothing of heads."""

    name: ClassVar[str] = "uniform"
    exactness: ClassVar[Exactness] = Exactness.REASSOCIATED

    def apply(self, cascade, site):
        return replace(cascade, name="uniform")


def test_what_cannot_be_limited_to_heads_keeps_the_whole_site():
    policy = Policy([Rule(Where(heads="1"), Uniform()), Rule(apply="window(3)")])
    plan = plan_of(policy, ENCODER[0])
    assert [s.text for s in plan] == ["keep"]
    assert plan.steps[0].note == "heads-differ"
    (refusal,) = plan.refusals
    assert refusal.code == "heads-differ"
    assert refusal.site == ENCODER[0].name
    whole = plan_of(Policy([Rule(apply=Uniform())]), ENCODER[0])
    assert rewritten(ENCODER[0], *whole).name == "uniform"


def test_cross_attention_needs_its_kind_named():
    plan = plan_of(Policy.parse("window(4)"), ENCODER[0], CROSS)
    assert [s.text for s in plan] == ["window(size=4)", "keep"]
    assert [r.code for r in plan.refusals] == ["window-cross"]
    named = plan_of(Policy([Rule(Where(kind="cross"), "window(4)")]), CROSS)
    assert [s.text for s in named] == ["window(size=4)"]
    assert named.refusals == ()
    assert rewritten(CROSS, *Plan.from_json(named.dumps())) != CROSS.cascade


def test_a_site_that_cannot_be_rewritten_is_kept_with_its_reasons():
    site = replace(ENCODER[0], refusals=(Refusal("probabilities-escape", "the map is returned"),))
    plan = plan_of(Policy.parse("exact"), site)
    assert [s.text for s in plan] == ["keep"]
    assert [(r.code, r.site) for r in plan.refusals] == [("probabilities-escape", site.name)]
    assert plan_of(Policy.parse("keep"), site).refusals == ()


def test_a_glob_that_matches_nothing_is_an_error():
    with pytest.raises(
        PolicyError, match=r"rule 2: layer 'encodr.0.*' matches no Site; nearest:.*enc"
    ):
        plan_of(Policy([Rule(apply="exact"), Rule(Where("encodr.0.*"), "keep")]), *ENCODER)
    with pytest.raises(PolicyError, match="the model has no attention Site"):
        plan_of(Policy([Rule(Where("x"), "exact")]))
    assert plan_of(Policy.parse("exact")) == Plan((), (), "exact")


def test_a_head_that_does_not_exist_is_an_error():
    with pytest.raises(PolicyError, match=r"there is no head 4, 9; .* heads 0-3"):
        plan_of(Policy([Rule(Where(heads=[1, 4, 9]), "window(2)")]), *ENCODER)


def test_a_rule_without_effect_is_told():
    plan = plan_of(Policy([Rule(apply="exact"), Rule(Where("encoder.0"), "window(4)")]), *ENCODER)
    (refusal,) = plan.refusals
    assert refusal.code == "rule-unused"
    assert "rule 2 (window(size=4))" in refusal.reason


class Pad(nn.Module):
    def forward(self, x):
        return x + 1


def dynamic_size(low, high):
    dim = torch.export.Dim("n", min=low, max=high)
    shapes = {"x": {0: dim}}
    program = torch.export.export(Pad(), (torch.zeros(16),), dynamic_shapes=shapes)
    node = next(n for n in program.graph.nodes if n.op == "placeholder")
    return node.meta["val"].shape[0]


def test_length_ranges():
    short = make_site("a#0", q_len=64, kv_len=64)
    long = make_site("b#0", q_len=2048, kv_len=2048)
    policy = Policy([Rule(Where(length=">=1024"), "window(8)"), Rule(apply="exact")])
    assert [s.text for s in plan_of(policy, short, long)] == ["exact", "window(size=8)"]


def test_a_length_range_that_cuts_a_dynamic_length_is_refused():
    size = dynamic_size(4, 512)
    assert length_bounds(size) == (4, 512)
    site = make_site(q_len=size, kv_len=size)

    def plan_for(length):
        return plan_of(Policy([Rule(Where(length=length), "window(8)"), Rule(apply="exact")]), site)

    cut = plan_for(">=100")
    assert [s.text for s in cut] == ["keep"]
    refusal = cut.refusals[0]
    assert (refusal.code, refusal.site) == ("length-dynamic", site.name)
    assert "4 to 512" in refusal.reason
    assert [s.text for s in plan_for(">=4")] == ["window(size=8)"]
    assert [s.text for s in plan_for("4..512")] == ["window(size=8)"]
    assert [s.text for s in plan_for(">512")] == ["exact"]
    assert plan_for(">=4").steps[0].tiles is None


def test_expected_tiles():
    site = make_site(causal=True, hq=4, q_len=1024, kv_len=1024)
    exact = plan_of(Policy.parse("exact"), site).steps[0].tiles
    assert exact == (4 * 36, 4 * 64)  # the lower triangle of 8 x 8
    # 0 <= q - kv < 256 reaches the diagonal and two blocks before it.
    assert plan_of(Policy.parse("window(256)"), site).steps[0].tiles == (4 * 21, 4 * 64)
    some = plan_of(Policy([Rule(Where(heads="0"), "window(256)")]), site)
    assert some.steps[0].tiles == (21 + 3 * 36, 4 * 64)


def test_json_round_trip_and_replay():
    policy = Policy(
        [Rule(Where("decoder.0", heads="1-2"), "window(5, sinks=1)"), Rule(apply="window(7)")]
    )
    sites = (*ENCODER, *DECODER, CROSS)
    plan = plan_of(policy, *sites)
    again = Plan.from_json(plan.dumps())
    assert again == plan
    assert again.hash == plan.hash
    assert again == Plan.from_json(json.loads(plan.dumps()))
    check_sites(again, findings(*sites))
    for site in sites:
        assert rewritten(site, *again.of(site.name)) == rewritten(site, *plan.of(site.name))


def test_the_hash_is_that_of_what_is_done():
    plan = plan_of(Policy.parse("window(4)"), *ENCODER)
    noted = replace(plan, steps=tuple(replace(s, note="seen") for s in plan))
    assert noted.hash == plan.hash
    assert plan_of(Policy.parse("window(5)"), *ENCODER).hash != plan.hash


def test_sites_over_the_budget_go_back_to_exact():
    policy = Policy([Rule(Where("decoder.0", heads="0"), "window(2)"), Rule(apply="window(3)")])
    plan = plan_of(policy, ENCODER[0], DECODER[0])
    back = plan.without([DECODER[0].name], Refusal("over-budget", "cosine 0.9"))
    assert texts(back) == {
        (ENCODER[0].name, None): "window(size=3)",
        (DECODER[0].name, None): "exact",
    }
    assert [r.code for r in back.refusals] == ["over-budget"]


GOOD = plan_of(Policy.parse("window(4)"), ENCODER[0]).to_json()


def edited(**step):
    return {**GOOD, "steps": [{**GOOD["steps"][0], **step}]}


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ("{", "not valid JSON"),
        ([], "plan: found \\[\\], expected a table"),
        ({**GOOD, "schema": 99}, "schema is 99, this version reads 1"),
        ({**GOOD, "step": []}, "unknown key 'step'; did you mean 'steps'"),
        ({**GOOD, "steps": {}}, "plan, steps: found {}, expected a list"),
        (edited(transforms=[]), r"steps\[0\].transforms is empty"),
        (edited(transforms="exact"), r"steps\[0\].transforms: found 'exact', expected a list"),
        (edited(transforms=["windwo(4)"]), r"steps\[0\].transforms\[0\].*did you mean 'window'"),
        (edited(transforms=["exact"]), "exactness says 'approximate', but exact is exact"),
        (edited(heads=[]), r"steps\[0\].heads"),
        (edited(heads=[-1]), r"steps\[0\].heads"),
        (edited(heads=[True]), r"steps\[0\].heads"),
        (edited(named_kinds=["corss"]), "did you mean 'cross'"),
        (edited(site=3), r"steps\[0\].site: found 3"),
        (edited(sit="x"), r"steps\[0\]: unknown key 'sit'; did you mean 'site'"),
        (edited(tiles={"executed": "x"}), r"steps\[0\].tiles"),
        ({**GOOD, "steps": GOOD["steps"] * 2}, r"steps\[1\]: .* two steps for the same head"),
        ({**GOOD, "refusals": [{"cod": 1}]}, r"refusals\[0\]: unknown key 'cod'"),
        ({**GOOD, "versions": 3}, "versions: 3 is no table"),
    ],
)
def test_a_plan_edited_badly_says_where(data, says):
    with pytest.raises(PolicyError, match=says):
        Plan.from_json(data)


def test_a_plan_edited_well_is_followed():
    step = edited(transforms=["window(9)"], heads=[2, 0, 2])
    (found,) = Plan.from_json(step)
    assert found == Step(ENCODER[0].name, (Window(9),), (0, 2))


def test_a_plan_for_another_model_is_an_error():
    plan = Plan.from_json(edited(site="encoder.0.atn#0"))
    with pytest.raises(
        PolicyError, match=r"steps\[0\].*no Site 'encoder.0.atn#0'; nearest: encoder.0"
    ):
        check_sites(plan, findings(*ENCODER))
    plan = Plan.from_json(edited(heads=[7]))
    with pytest.raises(PolicyError, match="has heads 0-3, not 7"):
        check_sites(plan, findings(*ENCODER))


def test_a_step_belongs_to_its_site():
    with pytest.raises(ValueError, match="was applied to"):
        rewritten(ENCODER[0], Step(ENCODER[1].name, (Exact(),)))


@dataclass(frozen=True)
class Diagonal(SparsePattern):
    """Keep every ``stride``-th diagonal: what a stranger would write, in one file."""

    name: ClassVar[str] = "diagonal"
    stride: int = 2

    def mask(self, site):
        return eq((Q - KV) % self.stride, 0)


@dataclass(frozen=True)
class Cap(ScoreEdit):
    """Cap the scores smoothly at ``limit``."""

    name: ClassVar[str] = "cap"
    limit: float = 1.0

    def score(self, s, site):
        return call("tanh", s / self.limit) * self.limit


MINE = {**TRANSFORMS, "diagonal": Diagonal, "cap": Cap}


def dense(q, k, v, mask, edit=lambda s: s):
    scores = edit(q @ k.transpose(-1, -2) * 0.5)
    return torch.softmax(scores.masked_fill(~mask, -torch.inf), -1) @ v


@pytest.mark.parametrize("heads", [None, "1-2"])
def test_a_pattern_and_an_edit_of_a_stranger_go_all_the_way(heads):
    text = "diagonal(stride=3) | cap(limit=0.5)"
    rule = Rule(Where(heads=heads), list(Policy.parse(text, MINE).rules[0].apply))
    site = make_site(causal=True)
    plan = plan_of(Policy([rule]), site)
    assert plan.steps[0].text == text
    again = Plan.from_json(plan.dumps(), MINE)
    assert again == plan
    cascade = rewritten(site, *again.of(site.name))
    assert as_softmax(cascade) is not None
    generator = torch.Generator().manual_seed(3)
    q, k, v = torch.randn(3, 2, 4, 9, 8, generator=generator, dtype=torch.float64)
    position = torch.arange(9)
    distance = position[:, None] - position
    causal, own = distance >= 0, (distance >= 0) & (distance % 3 == 0)
    wanted = dense(q, k, v, own, lambda s: (s / 0.5).tanh() * 0.5)
    if heads:
        others = dense(q, k, v, causal)
        wanted = torch.cat([others[:, :1], wanted[:, 1:3], others[:, 3:]], dim=1)
    found = interpret(cascade, {"Q": q, "K": k, "V": v})["AV"]
    assert torch.allclose(found, wanted, rtol=0, atol=1e-13)


def test_a_stranger_is_checked_like_everyone():
    with pytest.raises(PolicyError, match="stride is 'x', expected int"):
        Policy.parse("diagonal(stride='x')", MINE)
    with pytest.raises(PolicyError, match="did you mean 'diagonal'"):
        Policy.parse("diagonl", MINE)
    assert Policy.parse("cap(limit=2)", MINE).rules[0].apply == (Cap(2),)
    plan = plan_of(Policy([Rule(apply=Diagonal())]), CROSS)
    assert [r.code for r in plan.refusals] == ["diagonal-cross"]
    site = make_site()
    assert "tanh" in str(score_of(Cap().apply(site.cascade, site)))


@given(st.lists(st.sampled_from(["0", "1-2", "3", "0-3", None]), min_size=1, max_size=4))
@settings(deadline=None)
def test_every_head_has_exactly_one_step(selections):
    rules = [Rule(Where(heads=h), f"window({i + 1})") for i, h in enumerate(selections)]
    site = DECODER[0]
    plan = plan_of(Policy(rules), site)
    covered = [h for s in plan for h in (range(site.hq) if s.heads is None else s.heads)]
    assert sorted(covered) == list(range(site.hq))
    ranges = {"0": {0}, "1-2": {1, 2}, "3": {3}}
    for step in plan:
        for head in range(site.hq) if step.heads is None else step.heads:
            first = next(
                (i for i, h in enumerate(selections) if head in ranges.get(h, range(4))), None
            )
            wanted = Keep() if first is None else Window(first + 1)
            assert step.transforms == (wanted,)
    terms = conjuncts(as_softmax(rewritten(site, *plan)).guard)
    assert parse_expr("kv <= q") in terms
