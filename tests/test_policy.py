"""Policies: what users write, what they get, and what they are told when it is wrong."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

import attn_rewrite as ar
from attn_rewrite.budget import METRICS, Bound, Budget
from attn_rewrite.errors import PolicyError
from attn_rewrite.passes import TRANSFORMS
from attn_rewrite.passes.keep import Exact, Keep
from attn_rewrite.passes.sparse.window import Window
from attn_rewrite.policy import Length, Policy, Rule, Where, describe_transforms, parse_heads
from attn_rewrite.policy_text import parse_pipeline
from attn_rewrite.report import ErrorMeasure
from tests.sites import make_site


def test_pipelines():
    assert parse_pipeline("window(size=256, sinks=4) | exact") == (Window(256, 4), Exact())
    assert parse_pipeline("window(256)") == parse_pipeline(" window( size = 256 ) ")
    assert parse_pipeline("keep()") == parse_pipeline("keep") == (Keep(),)
    assert parse_pipeline("window(8, causal=true, left=none)") == (Window(8, causal=True),)
    assert parse_pipeline("window(8)\n  | exact\n") == (Window(8), Exact())


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "empty"),
        ("windwo(256)", "column 1: unknown transform 'windwo'; did you mean 'window'?"),
        ("exact | windwo", "column 9: unknown"),
        ("exact |\n windwo", "line 2, column 2: unknown"),
        ("window(szie=3)", "column 8: window has no option 'szie'; did you mean 'size'?"),
        ("window(size=0)", "column 13: window: size is 0, expected at least 1"),
        ("window(size=256, sinks=-1)", "sinks is -1, expected at least 0"),
        ("window(1.5)", "size is 1.5, expected int or none"),
        ("window(size=true)", "size is true"),
        ("window(size='8')", "size is '8'"),
        ("window(size=big)", "'big' is no number"),
        ("window", "size is missing"),
        ("window(1, 2, true, none, none, 6)", "window has 5 options: size, sinks"),
        ("window(1, size=2)", "given size twice"),
        ("window(size=2, size=3)", "given size twice"),
        ("window(**x)", "no option"),
        ("window(size=256", "column 7: '\\(' was never closed"),
        ("exact keep", "invalid syntax"),
        ("exact |", "invalid syntax"),
        ("exact | 3", "'3' is no transform"),
        ("exact & keep", "no transform"),
        ("a) | (b", "unmatched"),
        ("x.y(3)", "no transform"),
        ("exact\0", "null"),
        ("(" * 5000, "nested too deeply|too many nested"),
        ("é | exact", "column 1: unknown transform 'é'"),
    ],
)
def test_pipeline_errors(text, says):
    with pytest.raises(PolicyError, match=says) as caught:
        Policy.parse(text)
    assert isinstance(caught.value, ValueError)
    assert len(str(caught.value)) < 400


@given(
    st.builds(
        Window,
        size=st.integers(1, 10**6),
        sinks=st.integers(0, 99),
        causal=st.sampled_from([None, True, False]),
    )
)
def test_text_of_a_transform_reads_back(window):
    assert parse_pipeline(str(window)) == (window,)


@given(st.text(max_size=30))
def test_any_text_is_a_policy_or_a_policy_error(text):
    try:
        policy = Policy.parse(text)
    except PolicyError:
        return
    assert Policy.parse(str(policy)) == policy


FILE = """
[[rule]]
where = { layer = ["encoder.*", "decoder.0"], kind = "self", heads = "0-3, 8", length = ">=1024" }
apply = "window(size=256) | exact"

[[rule]]
where = { causal = true, heads = [1, 2] }
apply = ["window(64)", "exact"]

[[rule]]
apply = "keep"

[budget]
site = "cosine>=0.999"
end_to_end = "relative_l1<=0.01"
"""


def test_files(tmp_path):
    path = tmp_path / "policy.toml"
    path.write_text(FILE)
    policy = Policy.load(path)
    assert Policy.of(str(path)) == Policy.of(policy) == policy
    first, second, last = policy.rules
    assert first.where == Where(
        ["encoder.*", "decoder.0"], "self", heads=[0, 1, 2, 3, 8], length=Length(1024)
    )
    assert first.apply == (Window(256), Exact())
    assert (second.where.causal, second.where.heads) == (True, (1, 2))
    assert second.apply == (Window(64), Exact())
    assert last == Rule(Where(), Keep())
    assert policy.budget == Budget(Bound("cosine", 0.999), Bound("relative_l1", 0.01))
    assert Policy.from_toml(policy.to_toml()) == policy
    assert Policy.from_toml(str(policy)) == policy


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("rule = 3", "write \\[\\[rule\\]\\]"),
        ("", "there is no \\[\\[rule\\]\\]"),
        ("[[rule]]\napply = =\n", "not valid TOML.*line 2"),
        ("[[rule]]\nappyl = 'exact'", "rule 1 \\(line 1\\).*'appyl'; did you mean 'apply'"),
        (
            "[[rule]]\napply='exact'\n\n[[rule]]\napply='windwo'",
            "rule 2 \\(line 4\\).*did you mean",
        ),
        ("[[rule]]\nwhere = {layre='a'}\napply='exact'", "'layre'; did you mean 'layer'"),
        ("[[rule]]\nwhere = {kind='slef'}\napply='exact'", "kind 'slef'; did you mean 'self'"),
        ("[[rule]]\nwhere = {layer=3}\napply='exact'", "where.layer is 3"),
        ("[[rule]]\nwhere = {causal='yes'}\napply='exact'", "causal is 'yes'"),
        ("[[rule]]\nwhere = {heads='3-1'}\napply='exact'", "no range of heads"),
        ("[[rule]]\nwhere = {heads=[-1]}\napply='exact'", "no head"),
        ("[[rule]]\nwhere = {heads=[]}\napply='exact'", "heads is empty"),
        ("[[rule]]\nwhere = {length='long'}\napply='exact'", "length 'long' is no range"),
        ("[[rule]]\nwhere = {length='9..3'}\napply='exact'", "empty range"),
        ("[[rule]]\nwhere = 'all'\napply='exact'", "where is 'all'"),
        ("[[rule]]\nwhere = {}", "apply is missing"),
        ("[[rule]]\napply = []", "applies nothing"),
        ("[[rule]]\napply = 3", "apply is 3"),
        ("[[rule]]\napply='exact'\n[budget]\nsite='cosin>=1'", "'cosin'; did you mean 'cosine'"),
        ("[[rule]]\napply='exact'\n[budget]\nsite=0.9", "needs metric"),
        ("[[rule]]\napply='exact'\n[budget]\nmetric='cosine'", "bounds nothing"),
        ("[[rule]]\napply='exact'\n[budgte]\nx=1", "'budgte'; did you mean 'budget'"),
    ],
)
def test_file_errors(tmp_path, text, says):
    path = tmp_path / "p.toml"
    path.write_text(text)
    with pytest.raises(PolicyError, match=says) as caught:
        Policy.load(path)
    assert "p.toml" in str(caught.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(PolicyError, match="cannot be read"):
        Policy.load(tmp_path / "none.toml")


def test_public_names():
    policy = ar.Policy(
        rules=[ar.Rule(where=ar.Where(layer="a.*"), apply=["window(8)", Exact()])],
        budget="cosine>=0.99",
    )
    assert policy.rules[0].apply == (Window(8), Exact())
    assert policy.budget == Budget.parse("cosine>=0.99")
    with pytest.raises(PolicyError, match="no rule"):
        ar.Policy(rules=[])


@pytest.mark.parametrize(
    ("text", "low", "high", "wanted"),
    [
        (">=1024", 1024, 1024, True),
        (">=1024", 1023, 1023, False),
        (">1024", 1024, 1024, False),
        ("<512", 511, 511, True),
        ("<512", 512, 512, False),
        ("<=512", 512, 512, True),
        ("512..4096", 600, 600, True),
        ("77", 77, 77, True),
        (">=1024", 2, None, None),
        (">=1024", 1024, None, True),
        ("<512", 2, 511, True),
        ("<512", 2, 600, None),
        ("<512", 512, None, False),
        (">=1024", 2, 1023, False),
        ("512..4096", 600, None, None),
    ],
)
def test_lengths(text, low, high, wanted):
    assert Length.parse(text).holds(low, high) is wanted


def test_heads():
    assert parse_heads("0-3, 8") == (0, 1, 2, 3, 8)
    assert parse_heads(5) == (5,)
    assert parse_heads([3, "1", 3]) == (1, 3)
    with pytest.raises(PolicyError):
        parse_heads(True)


@pytest.mark.parametrize(
    ("where", "wanted"),
    [
        (Where(), True),
        (Where("encoder.layer.1.attention.self#0"), True),
        (Where("encoder.layer.1.*"), True),
        (Where("encoder.layer.1"), True),
        (Where("*.layer.1"), True),
        (Where("encoder.layer.?"), True),
        (Where("encoder.layer"), True),
        (Where("layer"), False),
        (Where("encoder.layer.10"), False),
        (Where(["decoder", "encoder"]), True),
        (Where(kind="cross"), False),
        (Where(kind=["cross", "self"]), True),
        (Where(causal=True), False),
        (Where("encoder.*", causal=False), True),
    ],
)
def test_where(where, wanted):
    site = make_site("encoder.layer.1.attention.self#0")
    assert where.matches(site) is wanted


def test_budgets():
    both = Budget.parse("cosine>=0.999")
    assert both.site == both.end_to_end == Bound("cosine", 0.999)
    split = Budget.parse("site: cosine >= 0.99, end_to_end: max_abs<=1e-2")
    assert split == Budget(Bound("cosine", 0.99), Bound("max_abs", 0.01))
    for budget in (both, split, Budget(site=Bound("rmse", 0.5))):
        assert Budget.parse(str(budget)) == budget
    table = Budget.from_table({"metric": "rmse", "site": 0.1, "end_to_end": "cosine>=0.5"})
    assert table == Budget(Bound("rmse", 0.1), Bound("cosine", 0.5))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("cosine", "not a bound"),
        ("cosine<=0.9", "cosine is bounded as cosine>="),
        ("rmse>=0.9", "rmse is bounded as rmse<="),
        ("cosine>=1.5", "expected -1 to 1"),
        ("rmse<=-1", "at least 0"),
        ("rmse<=inf", "finite"),
        ("rmse<=nan", "expected a finite"),
        ("rmse<=x", "not a number"),
        ("rsme<=1", "did you mean 'rmse'"),
        ("sit: rmse<=1", "did you mean 'site'"),
        ("rmse<=1, site: rmse<=2", "twice"),
    ],
)
def test_budget_errors(text, says):
    with pytest.raises(PolicyError, match=says):
        Budget.parse(text)


@pytest.mark.parametrize("metric", sorted(METRICS))
def test_bounds_hold_at_the_limit_and_never_for_nan(metric):
    sign = 1 if metric == "cosine" else -1
    bound = Bound(metric, 0.5)
    fields = {"cosine": 1.0, "relative_l1": 0.0, "rmse": 0.0, "max_abs": 0.0, "max_reference": 1.0}

    def allows(value):
        return bound.allows(ErrorMeasure(**{**fields, metric: value}))

    assert allows(0.5)
    assert allows(0.5 + sign * 0.1)
    assert not allows(0.5 - sign * 0.1)
    assert not allows(float("nan"))


def test_every_transform_is_described():
    infos = {info.name: info for info in describe_transforms()}
    assert set(infos) == set(TRANSFORMS) >= {"exact", "keep", "window"}
    window = infos["window"]
    assert window.exactness == "approximate"
    assert "2020" in window.source
    fields = {f.name: (f.default, f.type) for f in window.fields}
    assert fields["sinks"] == ("0", "int")
    assert fields["causal"] == ("none", "bool or none")
    for info in infos.values():
        assert info.summary
        assert all(f.doc for f in info.fields)


@pytest.mark.parametrize("size", [2**31, 2**63 - 1, 10**20])
def test_a_size_that_positions_cannot_hold_is_refused(size: int) -> None:
    """Sums of positions and options would leave 64 bits, and wrap."""
    with pytest.raises(PolicyError, match="expected at most 2147483647"):
        Policy.parse(f"window(size={size})")
