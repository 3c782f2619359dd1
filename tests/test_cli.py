"""The command line: exit codes, one JSON document on standard output, and what a run leaves."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from attn_rewrite import knobs
from attn_rewrite.errors import PolicyError, ToolError
from tests.bad_checkpoints import tiny_bert
from tests.command import Outcome, attn_rewrite

SITE = "encoder.layer.0.attention.self#0"


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bert") / "model with space"
    folder.mkdir()
    return tiny_bert(folder)


@pytest.fixture(scope="module")
def result(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    """A model rewritten and exported, and what the command said."""
    folder = tmp_path_factory.mktemp("result") / "out"
    words = ("--policy", "window(size=8)", "--export", "onnx", "--length", "36", "--json")
    dump = folder.parent / "dump"
    done = attn_rewrite("optimize", bert, *words, "-o", folder, env={knobs.DUMP: str(dump)})
    assert done.code == 0, done.err
    return folder, done


def test_help_of_every_command_names_its_options() -> None:
    commands = attn_rewrite("--help", env={"COLUMNS": "120"})
    assert commands.code == 0
    for name in ("inspect", "explain", "optimize", "verify", "bench", "policies", "cascade"):
        assert name in commands.out
        done = attn_rewrite(name, "--help", env={"COLUMNS": "120"})
        assert done.code == 0
        assert "--json" in done.out
        assert "--debug" in done.out


def test_version() -> None:
    done = attn_rewrite("--version")
    assert (done.code, done.out, done.err) == (0, "attn-rewrite 0.1.0\n", "")


def test_installed_script_is_the_module() -> None:
    script = Path(sys.executable).with_name("attn-rewrite")
    done = subprocess.run([script, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == attn_rewrite("--version").out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("optmize", "x"), "Did you mean 'optimize'"),
        (("optimize", "x", "-o", "y", "--polcy", "exact"), "--policy"),
        (("optimize", "x"), "Missing option '--output'"),
        (("optimize",), "Missing argument"),
        (("inspect", "x", "--dtype", "int3"), "'float32'"),
        (("inspect", "x", "--batch", "0"), "--batch"),
        (("inspect", "x", "--length", "many"), "--length"),
        (("explain", "x", "--why-not", "windo"), "did you mean 'window'"),
        (("cascade", "attention-3pas"), "did you mean 'attention-3pass'"),
        (("cascade", "attention-3pass", "--count", "z"), "no rank 'z'"),
        (("policies", "windw"), "did you mean 'window'"),
        (("bench", "x", "--repeats", "0"), "--repeats"),
    ],
)
def test_usage_error(words: tuple[str, ...], says: str, tmp_path: Path) -> None:
    done = attn_rewrite(*words, cwd=tmp_path)
    assert (done.code, done.out) == (2, "")
    assert says in done.error
    told = attn_rewrite(*words, "--json", cwd=tmp_path)
    assert told.code == 2
    assert told.document["error"]["exit_code"] == 2


def test_no_command_is_a_usage_error_that_shows_help() -> None:
    done = attn_rewrite()
    assert done.code == 2
    assert "optimize" in done.out + done.err


def test_policies() -> None:
    transforms = {t["name"]: t for t in attn_rewrite("policies", "--json").document["transforms"]}
    assert {"exact", "keep", "window"} <= transforms.keys()
    assert transforms["exact"]["exactness"] == "exact"
    assert transforms["window"]["exactness"] == "approximate"
    assert "sinks" in {f["name"] for f in transforms["window"]["fields"]}
    page = attn_rewrite("policies", "window")
    assert page.code == 0
    assert "first keys that every query sees" in page.out


def test_cascade_counts_and_fuses(tmp_path: Path) -> None:
    written = attn_rewrite("cascade", "attention-3pass", "--count", "m", "--json").document
    assert written["passes"]["passes"] == 3
    done = attn_rewrite("cascade", "attention-3pass-deferred", "--fuse", "m", "--json")
    assert done.code == 0, done.err
    assert done.document["passes"]["passes"] == 1
    assert done.document["proofs"]
    # What was printed is a cascade that can be read again.
    (tmp_path / "fused.txt").write_text(done.document["cascade"])
    again = attn_rewrite("cascade", tmp_path / "fused.txt", "--count", "m", "--json")
    assert again.document["cascade"] == done.document["cascade"]


def test_cascade_draws(tmp_path: Path) -> None:
    done = attn_rewrite("cascade", "attention-3pass", "--svg", tmp_path / "a.svg")
    assert done.code == 0, done.err
    assert (tmp_path / "a.svg").read_text().lstrip().startswith(("<svg", "<?xml"))
    refused = attn_rewrite("cascade", "attention-3pass", "--svg", tmp_path / "no" / "a.svg")
    assert refused.code == 5


def test_doctor_tries_what_is_installed() -> None:
    done = attn_rewrite("doctor", "--json")
    assert done.code == 0, done.out
    checks = {check["name"]: check for check in done.document["checks"]}
    assert checks["torch"]["status"] == "works"
    assert checks["onnxruntime"]["status"] == "works"
    assert done.document["broken"] == []


def test_inspect(bert: Path) -> None:
    done = attn_rewrite("inspect", bert, "--json")
    assert done.code == 0, done.err
    (site,) = done.document["sites"]
    expected = {"name": SITE, "kind": "self", "family": "softmax", "causal": False, "hq": 2}
    assert expected.items() <= site.items()
    assert site["rewritable"] is True
    table = attn_rewrite("inspect", bert, env={"COLUMNS": "160"})
    assert (table.code, "1 attention site in" in table.out) == (0, True)
    assert "encoder.layer.0" in table.out


def test_inspect_without_attention_is_1(tmp_path: Path) -> None:
    (tmp_path / "plain.py").write_text(
        "import torch\n"
        "class Router(torch.nn.Module):\n"
        "    def forward(self, x):\n"
        "        return x.softmax(-1)\n"
        "def make():\n"
        "    print('chatter on standard output')\n"
        "    return Router().eval(), (torch.ones(2, 4),), {}, None\n"
    )
    done = attn_rewrite("inspect", "plain:make", "--json", cwd=tmp_path)
    assert done.code == 1
    assert done.document["sites"] == []
    assert "chatter on standard output" in done.err
    (refusal,) = done.document["refusals"]
    assert refusal["code"]
    assert "plain.py" in refusal["source"]


def test_explain_without_attention_is_1(tmp_path: Path) -> None:
    (tmp_path / "plain.py").write_text(
        "import torch\n"
        "def make():\n"
        "    return torch.nn.Softmax(-1).eval(), (torch.ones(2, 4),), {}, None\n"
    )
    done = attn_rewrite("explain", "plain:make", "--json", cwd=tmp_path)
    assert done.code == 1, done.err
    assert len(done.document["refusals"]) == 1


def test_explain(bert: Path) -> None:
    words = ("--site", "encoder.layer.0", "--policy", "window(size=8)", "--length", "40")
    document = attn_rewrite("explain", bert, *words, "--json").document
    assert document["site"]["name"] == SITE
    assert document["changed"] is True
    assert document["before"]["passes"]["passes"] == 3
    assert document["extents"]["kv"] == 40
    assert document["before"]["cascade"] != document["after"]["cascade"]
    assert {rule["rule"] for rule in document["rules"]} >= {"exact", "keep", "window"}
    shown = attn_rewrite("explain", bert, *words)
    assert document["after"]["cascade"] in shown.out
    proofs = document["before"]["fusion"]["proofs"]
    assert document["after"]["fusion"]["proofs"] == proofs
    assert shown.out.count("derived: 3 -> 1 passes") == 1
    assert shown.out.count("derived as before") == 1


def test_explain_why_not(bert: Path) -> None:
    done = attn_rewrite("explain", bert, "--why-not", "window(size=8)", "--json")
    assert done.code == 0, done.err
    (verdict,) = done.document["verdicts"]
    assert (verdict["as"], verdict["applies"]) == ("window(size=8)", True)
    wrong = attn_rewrite("explain", bert, "--site", "encoder.layer.7")
    assert wrong.code == 2
    assert SITE in wrong.error


def test_optimize_writes_the_folder(result: tuple[Path, Outcome]) -> None:
    folder, done = result
    document = done.document
    assert set(document["files"]) == {
        str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()
    }
    wanted = {"model.pt2", "model.onnx", "plan.json", "report.json", "config.json"}
    assert wanted <= set(document["files"])
    report = json.loads((folder / "report.json").read_text())
    assert {"sites", "refusals", "end_to_end", "timings", "versions"} <= report.keys()
    assert {key: document[key] for key in report} == report
    (site,) = report["sites"]
    assert site["status"] == "unbudgeted"
    assert report["inputs"].startswith("inputs generated: batch 2, length 36")
    assert document["exports"][0]["file"] == "model.onnx"


def test_stages_are_dumped_numbered(result: tuple[Path, Outcome]) -> None:
    names = sorted(path.name for path in (result[0].parent / "dump").iterdir())
    assert [int(name[:2]) for name in names] == list(range(len(names)))
    assert names[0] == "00-capture.fx"
    assert any(name.endswith(".cascade") for name in names)
    assert any(name.endswith("plan.json") for name in names)


def test_plan_is_replayed(result: tuple[Path, Outcome], bert: Path, tmp_path: Path) -> None:
    folder, _ = result
    words = ("--plan", folder / "plan.json", "--length", "36", "-o", tmp_path / "again", "--json")
    done = attn_rewrite("optimize", bert, *words)
    assert done.code == 0, done.err
    first, second = (
        json.loads((f / "plan.json").read_text()) for f in (folder, tmp_path / "again")
    )
    assert first["steps"] == second["steps"]
    assert first["hash"] == second["hash"]

    def numbers(path: Path) -> Any:
        return json.loads((path / "report.json").read_text())["end_to_end"]

    assert numbers(folder) == numbers(tmp_path / "again")


def test_budget_that_no_window_meets_is_1(bert: Path, tmp_path: Path) -> None:
    words = ("--policy", "window(size=2)", "--budget", "cosine>=0.9999999", "-o", tmp_path / "out")
    done = attn_rewrite("optimize", bert, *words, "--json")
    assert done.code == 1, done.err
    (site,) = done.document["sites"]
    assert site["status"] == "reverted"
    assert "budget" in done.err


def test_verify_and_bench_of_a_saved_result(result: tuple[Path, Outcome]) -> None:
    folder, _ = result
    checked = attn_rewrite("verify", folder, "--json")
    assert checked.code == 0, checked.err
    errors, bounds = checked.document["errors"], checked.document["bounds"]
    assert set(errors) == {"model.pt2", "model.onnx"}
    for measured in errors.values():
        assert measured
        assert all(measured[name] <= bounds[name] for name in measured)
    timed = attn_rewrite("bench", folder, "--repeats", "3", "--warmup", "1", "--json")
    assert timed.code == 0, timed.err
    document = timed.document
    ratio = document["original"]["median_s"] / document["rewritten"]["median_s"]
    assert document["speedup"] == pytest.approx(ratio)
    assert document["policy"] == "window(size=8)"


def test_bench_of_a_model(bert: Path) -> None:
    done = attn_rewrite("bench", bert, "--policy", "exact", "--repeats", "2")
    assert done.code == 0, done.err
    assert "median ratio" in done.out


def test_verify_finds_another_original(result: tuple[Path, Outcome], tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    tiny_bert(other, hidden_act="relu", initializer_range=0.05)
    done = attn_rewrite("verify", result[0], "--original", other)
    assert done.code == 3
    assert "model.safetensors" in done.error


def test_verify_finds_a_changed_file(result: tuple[Path, Outcome], tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(result[0], copy)
    data = bytearray((copy / "model.pt2").read_bytes())
    data[len(data) // 2] ^= 1
    (copy / "model.pt2").write_bytes(data)
    done = attn_rewrite("verify", copy)
    assert done.code == 3
    assert "model.pt2" in done.error


@pytest.mark.slow
def test_verify_finds_wrong_numbers(
    result: tuple[Path, Outcome], bert: Path, tmp_path: Path
) -> None:
    # An honest folder whose ONNX file is that of another policy: hashes fit, numbers do not.
    words = ("--policy", "exact", "--export", "onnx", "--length", "36", "-o", tmp_path / "exact")
    assert attn_rewrite("optimize", bert, *words).code == 0
    from attn_rewrite.checkpoint import load_model
    from attn_rewrite.saved import seal

    copy = tmp_path / "copy"
    shutil.copytree(result[0], copy)
    shutil.copy(tmp_path / "exact" / "model.onnx", copy / "model.onnx")
    seal(copy, source=load_model(bert))
    done = attn_rewrite("verify", copy)
    assert done.code == 4
    assert "model.onnx" in done.error


# Knobs


def test_debug_level_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    for text, level in (("", 0), ("3", 3), (" 4 ", 4)):
        monkeypatch.setenv(knobs.DEBUG, text)
        assert knobs.debug_level() == level
    for text in ("5", "-1", "yes"):
        monkeypatch.setenv(knobs.DEBUG, text)
        with pytest.raises(PolicyError, match="expected a level from 0 to 4"):
            knobs.debug_level()


def test_override_is_scoped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(knobs.DUMP, raising=False)
    monkeypatch.setenv(knobs.DEBUG, "1")
    with knobs.override(dump=tmp_path):
        assert (knobs.dump_directory(), knobs.debug_level()) == (tmp_path, 1)
        with knobs.override(debug=3):
            assert (knobs.dump_directory(), knobs.debug_level()) == (tmp_path, 3)
        assert knobs.debug_level() == 1
    assert knobs.dump_directory() is None
    with pytest.raises(PolicyError), knobs.override(debug=9):
        pass


def test_dumper_writes_what_changed(tmp_path: Path) -> None:
    dumper = knobs.Dumper(tmp_path / "dump")
    dumper.write("capture", "a", suffix=".fx")
    dumper.write("fold scale", "a", suffix=".fx")
    dumper.write("plan", lambda: "a", suffix=".json")
    dumper.write("found-other", "a", suffix=".fx", of="other")
    dumper.write("fold/mask", "b\n", suffix=".fx")
    written = {p.name: p.read_text() for p in (tmp_path / "dump").iterdir()}
    assert written == {
        "00-capture.fx": "a\n",
        "01-plan.json": "a\n",
        "02-found-other.fx": "a\n",
        "03-fold-mask.fx": "b\n",
    }


def test_dumper_without_folder_makes_no_text() -> None:
    knobs.Dumper(None).write("capture", lambda: pytest.fail("the text was made"))


@pytest.mark.parametrize(
    ("level", "suffixes"),
    [(0, []), (2, [".json"]), (3, [".json", ".fx"]), (4, [".json", ".fx", ".py"])],
)
def test_stages_are_told_from_their_level_on(
    level: int, suffixes: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with knobs.override(debug=level):
        for suffix in (".json", ".fx", ".py"):
            knobs.Dumper(None).write("stage" + suffix, "text", suffix=suffix)
    told = [f"[attn-rewrite] stage{suffix}\ntext\n" for suffix in suffixes]
    assert capsys.readouterr().err == "".join(told)


def test_dump_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ToolError, match="ATTN_REWRITE_DUMP"):
        knobs.Dumper(tmp_path / "file").write("capture", "a")


def test_tell_is_heard_from_its_level_on(capsys: pytest.CaptureFixture[str]) -> None:
    with knobs.override(debug=2):
        knobs.tell(2, "a refusal")
        knobs.tell(3, lambda: pytest.fail("the text was made"))
    assert capsys.readouterr().err == "[attn-rewrite] a refusal\n"
