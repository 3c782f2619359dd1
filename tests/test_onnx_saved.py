"""A result that was saved and loaded leaves as the same ONNX file, up to names of values."""

from __future__ import annotations

import collections
import json
from collections.abc import Iterator
from pathlib import Path

import onnx
import pytest
import torch
from torch import nn

import attn_rewrite as ar
from attn_rewrite import export_onnx
from attn_rewrite.errors import LowerError
from tests.test_onnx import Sdpa, tokens

LENGTH = 160


class Spelled(Sdpa):
    """The same attention in plain operators."""

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        q, k, v = self.heads(x)
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        return (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v


class Layers(nn.Module):
    """One layer of each."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = Sdpa(), Spelled(), Sdpa(is_causal=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(x) + self.second(x) + self.third(x)


def told(graph: onnx.GraphProto | onnx.FunctionProto) -> Iterator[tuple[object, ...]]:
    """What is computed: every node with the places of what it reads, not their names."""
    places: dict[str, int] = collections.defaultdict(lambda: len(places))
    for value in graph.input:
        yield "input", places[value if isinstance(value, str) else value.name]
    for node in graph.node:
        read = tuple(places[name] for name in node.input)
        kept = tuple(a.SerializeToString() for a in node.attribute if not a.HasField("g"))
        inner = tuple(tuple(told(a.g)) for a in node.attribute if a.HasField("g"))
        yield node.domain, node.op_type, read, kept, inner
        yield tuple(places[name] for name in node.output)


def assert_same(path: Path, other: Path) -> None:
    one, two = onnx.load(path), onnx.load(other)
    assert list(told(one.graph)) == list(told(two.graph))
    assert one.graph.input == two.graph.input
    assert one.graph.output == two.graph.output
    weights = ([t.raw_data for t in m.graph.initializer] for m in (one, two))
    assert next(weights) == next(weights)
    assert len(one.functions) == len(two.functions)
    for mine, its in zip(one.functions, two.functions, strict=True):
        assert (mine.name, mine.doc_string) == (its.name, its.doc_string)
        assert list(told(mine)) == list(told(its))
    about = ({p.key: p.value for p in m.metadata_props} for m in (one, two))
    assert next(about) == next(about)


def exports(done: ar.OptimizedModule, folder: Path, **options: object) -> tuple[object, object]:
    """The module exported, and the same once more from where it was saved; the files are equal."""
    ar.save(done, folder / "saved")
    loaded = ar.load(folder / "saved")
    assert not loaded.sites
    assert loaded.anchors == done.anchors
    files = []
    for name, module in (("made", done), ("loaded", loaded)):
        files.append(export_onnx(module, folder / f"{name}.onnx", verify=not files, **options))
    assert files[0].sites == files[1].sites
    assert files[0].inputs == files[1].inputs
    assert_same(files[0].path, files[1].path)
    files[1].verify({"x": tokens(2, LENGTH).numpy()})
    return files[0], files[1]


@pytest.mark.parametrize(
    ("policy", "options", "form"),
    [
        pytest.param("combiner(segment=8)", {}, "einsums", marks=pytest.mark.slow),
        ("window(size=9, sinks=3)", {"target": "onnxruntime"}, "tiles"),
        pytest.param("int8", {}, "dense", marks=pytest.mark.slow),
        # No band: its lengths become those of the example.
        pytest.param("bigbird(block=8)", {}, "dense mask", marks=pytest.mark.slow),
        ("window(size=9)", {"static": True}, "tiles"),
    ],
)
def test_load_and_export(policy: str, options: dict, form: str, tmp_path: Path) -> None:
    fixed = {"dynamic_shapes": {}} if form in ("einsums", "dense") else {}
    done = ar.optimize(Sdpa().eval(), policy, (tokens(2, LENGTH),), **fixed)
    _, loaded = exports(done, tmp_path, **options)
    (site,) = loaded.sites
    assert site.name == done.sites[0].name
    assert site.form == form
    assert ("attn_rewrite.lengths" in loaded.metadata) == (
        form == "dense mask" or bool(options.get("static"))
    )
    (function,) = onnx.load(loaded.path).functions
    assert function.doc_string == function.metadata_props[0].value
    assert ar.cascade.parse(function.doc_string).name


@pytest.mark.slow
def test_what_is_left_alone_is_said_of_a_loaded_result_as_well(tmp_path: Path) -> None:
    """A site in torch's operator becomes ours either way; one in plain operators stays."""
    rules = [
        ar.Rule(where=ar.Where(layer="first"), apply=["window(size=9)"]),
        ar.Rule(apply=["keep"]),
    ]
    done = ar.optimize(Layers().eval(), ar.Policy(rules=rules), (tokens(2, LENGTH),))
    _, loaded = exports(done, tmp_path)
    forms = {site.name: site.form for site in loaded.sites}
    assert len(forms) == 3
    assert forms["first#0"] == "tiles"
    assert forms["second#0"] == "operators"
    about = {p.key: p.value for p in onnx.load(loaded.path).metadata_props}
    assert {s["name"] for s in json.loads(about["attn_rewrite.sites"])} == set(forms)


def test_a_loaded_result_is_refused_for_the_same_reason(tmp_path: Path) -> None:
    done = ar.optimize(Sdpa().eval(), "fp8", (tokens(2, LENGTH),))
    ar.save(done, tmp_path / "saved")
    said = []
    for module in (done, ar.load(tmp_path / "saved")):
        with pytest.raises(LowerError) as error:
            export_onnx(module, tmp_path / "m.onnx")
        said.append(str(error.value))
        assert not (tmp_path / "m.onnx").exists()
    assert said[0] == said[1]
    assert done.sites[0].name in said[0]
