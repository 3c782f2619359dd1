"""``cascade`` and ``explain`` by the command: differences, derivations, texts that are no cascade."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from attn_rewrite.cli.app import run

# Attention as a user may write it: other names, other order, one division behind the product.
OTHER = """cascade mine
ranks a, z, c, t
inputs Q[c, a], K[c, z], V[t, z]
output AV
L[z, a] = Q[c, a] * K[c, z]
MX[a] = L[z, a] :: reduce_z max
P[z, a] = exp(L[z, a] - MX[a])
Z[a] = P[z, a]
W[z, a] = P[z, a] / Z[a]
AV[t, a] = W[z, a] * V[t, z]
"""


def answer(capfd: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert run([*words, "--json"]) == 0
    document: dict[str, Any] = json.loads(capfd.readouterr().out)
    return document


def test_difference(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.txt").write_text(OTHER)
    same = answer(capfd, "cascade", "attention-3pass", "--diff", str(tmp_path / "mine.txt"))
    assert same["equivalent"] is True
    assert "MX is called GM" in same["diff"]
    other = answer(capfd, "cascade", "attention-3pass", "--diff", "attention-3pass-deferred")
    assert other["equivalent"] is False
    assert "+ AV[f, p] = SNV[f, p] / SD[p]" in other["diff"].splitlines()
    assert run(["cascade", "causal", "--diff", "causal"]) == 0
    assert "the cascades are equal" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("Y = X[n, n] * X[n]\n", "X[n] has 1 indices, but X has 2 ranks"),
        ("inputs X[n]\nY = X[n, n]\n", "X[n, n] has 2 indices, but X has 1 ranks"),
        ("Y = " + " + ".join(["X[n]"] * 3000) + "\n", "nests more than 250 operators"),
        ("Y = " + "(" * 4000 + "X[n]" + ")" * 4000 + "\n", "nests more than 250 operators"),
        ("cascade empty\n", "Einsum"),
        ("", "found the end of the text"),
        ("\x00", "found '\\x00'"),
        ("Y = X[n] :: reduce_n sum2\n", "expected a reduction of n"),
    ],
)
def test_what_is_no_cascade(
    text: str, says: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.txt").write_text(text)
    assert run(["cascade", str(tmp_path / "bad.txt")]) == 2
    told = capfd.readouterr()
    assert told.out == ""
    assert says in told.err
    assert "Traceback" not in told.err


def test_difference_is_of_cascades_as_they_are(capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["cascade", "causal", "--diff", "window", "--fuse", "m"]) == 2
    assert "leave out --fuse" in capfd.readouterr().err
    assert run(["cascade", "causal", "--diff", "windw"]) == 2
    assert "did you mean 'window'" in capfd.readouterr().err


MODELS = """
from tests.mixed_spellings import LENGTH, WIDTH, GatedSum, LinearBoth
import torch

def talking():
    return LinearBoth().eval(), (torch.randn(2, LENGTH, WIDTH),), {}, None

def gated():
    return GatedSum().eval(), (torch.randn(2, LENGTH, WIDTH),), {}, None
"""


@pytest.mark.parametrize(
    ("name", "code", "passes"),
    [("talking", "talking-heads", 3), ("gated", "probabilities-summed", 4)],
)
def test_explain_of_mixed_attention(
    name: str,
    code: str,
    passes: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "mixed_models.py").write_text(MODELS)
    monkeypatch.syspath_prepend(tmp_path)
    document = answer(capfd, "explain", f"mixed_models:{name}")
    before = document["before"]
    assert before["passes"]["passes"] == passes
    assert before["fusion"]["passes"] == 1
    assert before["fusion"]["refusals"] == []
    assert any("range guard" in proof for proof in before["fusion"]["proofs"])
    assert before["kernel"]["name"] == "dense"
    assert [r["code"] for r in document["refusals"]] == [code]
    verdicts = {v["rule"]: v for v in document["rules"]}
    assert verdicts["exact"]["refusal"]["code"] == code
