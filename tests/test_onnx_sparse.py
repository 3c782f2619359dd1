"""`SparseAttention` for CUDA: its lists by hand, what it is refused, its numbers on the CPU."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnx.inliner
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch import nn
from torch.export import Dim
from torch.nn import functional

import attn_rewrite as ar
from attn_rewrite import export_onnx
from attn_rewrite.backends.onnx import sparse
from attn_rewrite.backends.onnx.artifact import OnnxArtifact
from attn_rewrite.backends.onnx.graph import Recorder
from attn_rewrite.backends.onnx.sparse import BlockLists, as_csr, block_lists, cycle_of, emit_sparse
from attn_rewrite.backends.onnx.sparse_check import run_alone
from attn_rewrite.cascade.attention import QK, SoftmaxAttention, softmax_cascade
from attn_rewrite.cascade.expr import KV, Const, Expr, H, Q, Read, call, eq
from attn_rewrite.cascade.ir import TensorDecl
from attn_rewrite.cli.app import run
from attn_rewrite.errors import PolicyError, ToolError, VerifyError
from tests.bad_checkpoints import tiny_bert
from tests.command import attn_rewrite

HEADS, S, D = 4, 256, 128
QB, KB = call("floordiv", Q, 64), call("floordiv", KV, 64)
# Heads 0 and 2: the block before; heads 1 and 3: the first block.
ODD = call("mod", H, 2)
SHARDS = (eq(ODD, 0) & (QB - KB < 2)) | eq(KB, QB) | (eq(ODD, 1) & (KB < 1))
LAYOUTS = np.array(
    [
        [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]],
        [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 1]],
    ],
    bool,
)
SPARSE = "com.microsoft::SparseAttention"


class Shards(nn.Module):
    """One rewritten attention over q, k and v that are given."""

    def __init__(self, guard: Expr, group: int = 1, scale: float = 0.1) -> None:
        super().__init__()
        self.form = SoftmaxAttention(QK * scale, guard, group=group)
        self.text = str(softmax_cascade(self.form))

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.ops.attn_rewrite.tiled_attention(q, k, v, [], self.text, 64)


def given(
    group: int = 1, s: int = S, d: int = D, dtype: torch.dtype = torch.float16, b: int = 2
) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    heads = (HEADS, HEADS // group, HEADS // group)
    return tuple(torch.randn(b, h, s, d, generator=generator).to(dtype) for h in heads)


def export(
    model: nn.Module, x: tuple[torch.Tensor, ...], place: Path, **options: object
) -> OnnxArtifact:
    program = torch.export.export(model, x)
    return export_onnx(program, place, target="onnxruntime", provider="cuda", **options)


def operators(path: Path) -> set[str]:
    model = onnx.load(path)
    nodes = [*model.graph.node, *(n for f in model.functions for n in f.node)]
    return {f"{n.domain}::{n.op_type}" if n.domain else n.op_type for n in nodes}


# ------------------------------------------------------------------------------------ lists


def test_csr_of_two_layouts_by_hand() -> None:
    rows, columns = as_csr(LAYOUTS)
    assert rows.tolist() == [[0, 1, 3, 5, 7], [0, 1, 3, 5, 7]]
    assert columns.tolist() == [[0, 0, 1, 1, 2, 2, 3], [0, 0, 1, 0, 2, 0, 3]]


def test_csr_pads_the_shorter_layout_at_the_right() -> None:
    """The example of the operator's own description."""
    first = [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 1, 1, 1]]
    second = [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 1, 1]]
    rows, columns = as_csr(np.array([first, second], bool))
    assert rows.tolist() == [[0, 1, 3, 5, 8], [0, 1, 3, 6, 9]]
    assert columns.tolist() == [[0, 0, 1, 1, 2, 1, 2, 3, -1], [0, 0, 1, 0, 1, 2, 0, 2, 3]]
    assert (rows.dtype, columns.dtype) == (np.int32, np.int32)


def test_heads_take_the_fewest_layouts_in_turn() -> None:
    assert (cycle_of(LAYOUTS[[0, 1, 0, 1]]) == LAYOUTS).all()
    assert len(cycle_of(LAYOUTS[[0, 0, 0, 0]])) == 1
    assert len(cycle_of(LAYOUTS[[0, 0, 1, 1]])) == 4  # two in a row are no turn
    assert len(cycle_of(LAYOUTS[[0, 1, 0]])) == 3


def values(x: tuple[torch.Tensor, ...]) -> list[ir.Value]:
    kind = ir.DataType[{"float16": "FLOAT16", "float32": "FLOAT", "bfloat16": "BFLOAT16"}[
        str(x[0].dtype).removeprefix("torch.")
    ]]  # fmt: skip
    return [
        ir.Value(name=n, shape=ir.Shape(t.shape), type=ir.TensorType(kind))
        for n, t in zip("qkv", x, strict=True)
    ]


def test_lists_of_a_mask() -> None:
    found = block_lists(SoftmaxAttention(QK, SHARDS & (Q >= KV)), values(given()))
    assert isinstance(found, BlockLists)
    assert (found.layouts == LAYOUTS).all()
    assert (found.kept, found.total) == (28, 64)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_both_halves_are_taken(dtype: torch.dtype) -> None:
    form = SoftmaxAttention(QK, SHARDS & (Q >= KV))
    assert isinstance(block_lists(form, values(given(dtype=dtype))), BlockLists)


REFUSED: dict[str, tuple[Expr, dict[str, object], str]] = {
    "acausal": (SHARDS, {}, "causal mask, and this one is not"),
    "shifted": (SHARDS & (Q + 1 >= KV), {}, "causal mask, and this one is not"),
    "no diagonal": ((QB - KB > 0) & (Q >= KV), {}, "every diagonal block"),
    "no diagonal of a head": (
        (eq(KB, QB) & (H < 3) | (KB < 1)) & (Q >= KV), {}, "every diagonal block"),
    "blocks of 32": (
        eq(call("floordiv", Q, 32), call("floordiv", KV, 32)) & (Q >= KV), {}, "whole blocks"),
    "a window": ((Q - KV < 100) & (Q >= KV), {}, "whole blocks"),
    "nothing left out": (Q >= KV, {}, "has none"),
    "all blocks": ((QB - KB < 9) & (Q >= KV), {}, "leaves out no causal block"),
    "length": (SHARDS & (Q >= KV), {"s": 200}, "no multiple of"),
    "width": (SHARDS & (Q >= KV), {"d": 64}, "heads of 128"),
    "type": (SHARDS & (Q >= KV), {"dtype": torch.float32}, "float16 or bfloat16"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_operator_does_not_take_says_why(name: str) -> None:
    guard, options, words = REFUSED[name]
    found = block_lists(SoftmaxAttention(QK, guard), values(given(**options)))  # type: ignore[arg-type]
    assert isinstance(found, str)
    assert words in found
    assert found.startswith("SparseAttention")


def test_scores_lengths_and_shared_memory_it_does_not_take() -> None:
    guard, x = SHARDS & (Q >= KV), values(given())
    for form in (
        SoftmaxAttention(QK + call("cast_f32", KV), guard),
        SoftmaxAttention(QK * -1.0, guard),
        SoftmaxAttention(QK, guard, sink=Const(0.0)),
    ):
        assert "multiple of QK" in str(block_lists(form, x))
    form = SoftmaxAttention(QK, guard)
    assert "memory of their own" in str(block_lists(form, x, shared=True))
    for value in x:
        value.shape = ir.Shape([2, HEADS, "s", D])
    assert "static=True" in str(block_lists(form, x))


# ------------------------------------------------------------------------------------ numbers


def dense(x: tuple[torch.Tensor, ...], keep: np.ndarray, scale: float) -> np.ndarray:
    """Attention in float64 with ``keep`` [h, s, s]."""
    q, k, v = (t.double().numpy() for t in x)
    k, v = (t.repeat(q.shape[1] // k.shape[1], 1) for t in (k, v))
    score = np.where(keep, q @ k.swapaxes(-1, -2) * scale, -np.inf)
    weights = np.exp(score - score.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True) @ v


def tokens_kept(layouts: np.ndarray) -> np.ndarray:
    """Block lists of heads as a mask of tokens, causal."""
    return layouts.repeat(64, 1).repeat(64, 2) & np.tri(layouts.shape[1] * 64, dtype=bool)


def alone(
    layouts: np.ndarray, x: tuple[torch.Tensor, ...], folder: Path, group: int = 1
) -> np.ndarray:
    """The operator with any lists on the CPU."""
    r, formal = Recorder("site", 20), values(x)
    form = SoftmaxAttention(QK * 0.1, SHARDS & (Q >= KV), group=group)
    out = emit_sparse(r, formal, form, BlockLists(HEADS, layouts))
    graph = ir.Graph(formal, [out], nodes=r.nodes, name="f", opset_imports={"": 20})
    function = ir.Function("attn_rewrite", "f", "", graph=graph, attributes=[])
    return run_alone(function, [t.numpy() for t in x], folder)


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("batch", [1, 2])
def test_the_operator_is_the_mask(group: int, batch: int, tmp_path: Path) -> None:
    x = given(group, b=batch)
    got = alone(LAYOUTS, x, tmp_path, group)
    wide = dense(x, tokens_kept(LAYOUTS[[0, 1, 0, 1]]), 0.1)
    own = Shards(SHARDS & (Q >= KV), group)(*x).double().numpy()
    bound = max(2 * np.abs(own - wide).max(), 4 * 2**-10 * np.abs(wide).max())
    assert np.abs(got - wide).max() <= bound
    other = alone(LAYOUTS[::-1], x, tmp_path, group)  # the layouts of the other heads
    assert np.abs(other - wide).max() > 10 * bound


# ------------------------------------------------------------------------------------ files


@pytest.mark.parametrize("group", [1, 2])
def test_a_site_leaves_as_the_operator(group: int, tmp_path: Path) -> None:
    model = Shards(SHARDS & (Q >= KV), group)
    artifact = export(model, given(group), tmp_path / "m.onnx")
    (site,) = artifact.sites
    assert (site.form, site.skips, site.tiles) == ("SparseAttention", True, (28, 64))
    assert "not measured on CUDA" in site.choice
    assert SPARSE in operators(artifact.path)
    (function,) = onnx.load(artifact.path).functions
    assert function.doc_string == model.text
    assert set(artifact.operator_errors) == {function.name}
    assert 0 < artifact.operator_errors[function.name] < 0.01
    assert artifact.errors
    assert "nothing ran on CUDA" in artifact.checked
    assert artifact.metadata["attn_rewrite.checked"] == artifact.checked
    assert artifact.metadata["attn_rewrite.provider"] == artifact.provider == "cuda"
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


def test_s2_as_a_policy(tmp_path: Path) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.qkv = nn.Linear(32, 3 * 2 * D)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            b, s, _ = x.shape
            q, k, v = self.qkv(x).view(b, s, 3, 2, D).permute(2, 0, 3, 1, 4)
            return functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    x = torch.randn(1, 512, 32, generator=torch.Generator().manual_seed(0)).half()
    policy = ar.Policy.parse("s2(block=64, local=1, vertical=4)")
    done = ar.optimize(Model().half().eval(), policy, (x,))
    place = tmp_path / "m.onnx"
    artifact = export_onnx(done, place, target="onnxruntime", provider="cuda", static=True)
    (site,) = artifact.sites
    assert (site.form, site.operator) == ("SparseAttention", "tiled_attention")
    assert "in 2 layouts" in site.detail
    check_one_size_and_one_reader(place)


def check_one_size_and_one_reader(place: Path) -> None:
    """ONNX Runtime sees past and present caches of one size, and one reader of the past.

    Only then may its plan give both one memory, which the CUDA kernel demands.
    """
    model = onnx.inliner.inline_local_functions(onnx.load(place))
    (node,) = (n for n in model.graph.node if n.op_type == "SparseAttention")
    past, present = list(node.input[3:5]), list(node.output[1:3])
    for name in past:
        assert sum(list(n.input).count(name) for n in model.graph.node) == 1
    for name in (*past, *present):
        kind = onnx.TensorProto.FLOAT16
        model.graph.output.append(onnx.helper.make_tensor_value_info(name, kind, None))
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model.SerializeToString(), options)
    shapes = {o.name: o.shape for o in session.get_outputs()}
    for before, after in zip(past, present, strict=True):
        assert shapes[before] == shapes[after]
        assert None not in shapes[before]
        assert len(shapes[before]) == 4


def test_caches_of_a_dynamic_batch(tmp_path: Path) -> None:
    batch = Dim("n", min=1, max=8)
    model, place = Shards(SHARDS & (Q >= KV), 2), tmp_path / "m.onnx"
    program = torch.export.export(model, given(2), dynamic_shapes=({0: batch},) * 3)
    artifact = export_onnx(program, place, target="onnxruntime", provider="cuda")
    assert artifact.sites[0].form == "SparseAttention"
    assert artifact.inputs[0].shape[0] == "batch"
    check_one_size_and_one_reader(place)


class Listed(nn.Module):
    """Block lists of every head from a table, [h, blocks, blocks]."""

    def __init__(self, table: np.ndarray) -> None:
        super().__init__()
        guard = Read("L", (H, QB, KB)) & (Q >= KV)
        form = SoftmaxAttention(QK * 0.1, guard, reads=(TensorDecl("L", ("h", "i", "j")),))
        self.text = str(softmax_cascade(form))
        self.register_buffer("table", torch.from_numpy(table))

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.ops.attn_rewrite.tiled_attention(q, k, v, [self.table], self.text, 64)


def test_block_lists_of_a_table(tmp_path: Path) -> None:
    table = np.random.default_rng(0).random((HEADS, 4, 4)) < 0.3
    table |= np.eye(4, dtype=bool)
    artifact = export(Listed(table), given(), tmp_path / "m.onnx")
    (site,) = artifact.sites
    assert (site.form, site.tiles) == ("SparseAttention", (int(np.tril(table).sum()), 64))
    assert artifact.operator_errors
    table[2, 1, 1] = False
    (site,) = export(Listed(table), given(), tmp_path / "m.onnx").sites
    assert site.form != "SparseAttention"
    assert "every diagonal block" in site.choice


def test_other_sites_keep_our_own_form_and_say_that_nothing_was_measured(tmp_path: Path) -> None:
    model = Shards((Q - KV < 100) & (Q >= KV))
    x = given(dtype=torch.float32)
    artifact = export(model, x, tmp_path / "m.onnx")
    (site,) = artifact.sites
    assert site.form in ("tiles", "blocks")
    assert "SparseAttention takes" in site.choice
    assert site.choice.endswith("not measured on CUDA")
    assert not any(n.startswith("com.microsoft") for n in operators(artifact.path))
    assert artifact.operator_errors == {}
    assert artifact.checked == "the file ran on the CPU; nothing ran on CUDA"


def test_unchecked_says_so(tmp_path: Path) -> None:
    model = Shards(SHARDS & (Q >= KV))
    x = given(dtype=torch.bfloat16)
    artifact = export(model, x, tmp_path / "m.onnx", verify=False)
    assert artifact.sites[0].form == "SparseAttention"
    assert (artifact.checked, artifact.errors) == ("nothing was run", {})
    assert artifact.metadata["attn_rewrite.checked"] == "nothing was run"


class Inside(Shards):
    """In bfloat16 inside alone, so that the rest runs on the CPU."""

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return super().forward(*(x.bfloat16() for x in (q, k, v))).float()


def test_an_operator_that_cannot_be_compared_leaves_no_file(tmp_path: Path) -> None:
    x = given(dtype=torch.float32)
    with pytest.raises(ToolError, match=r"cannot compare: export in float16, or unchecked"):
        export(Inside(SHARDS & (Q >= KV)), x, tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_lists_of_the_wrong_heads_are_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sparse, "as_csr", lambda layouts: as_csr(layouts[::-1]))
    with pytest.raises(VerifyError, match="is off by"):
        export(Shards(SHARDS & (Q >= KV)), given(), tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_a_file_for_cuda_opens_on_cuda_or_not_at_all(tmp_path: Path) -> None:
    artifact = export(Shards(SHARDS & (Q >= KV)), given(), tmp_path / "m.onnx")
    with pytest.raises(ToolError, match="did not start CUDAExecutionProvider"):
        artifact.session()
    with pytest.raises(PolicyError, match="for CUDA"):
        artifact.run(dict(zip("qkv", (t.numpy() for t in given()), strict=True)), in_child=True)


def test_the_default_is_the_cpu_and_the_same_file(tmp_path: Path) -> None:
    program = torch.export.export(Shards(SHARDS & (Q >= KV)), given())
    plain = export_onnx(program, tmp_path / "a.onnx", target="onnxruntime")
    named = export_onnx(program, tmp_path / "b.onnx", target="onnxruntime", provider="cpu")
    assert plain.path.read_bytes() == named.path.read_bytes()
    assert SPARSE not in operators(plain.path)
    assert (plain.provider, plain.checked) == ("cpu", "")
    assert not {"attn_rewrite.provider", "attn_rewrite.checked"} & set(plain.metadata)
    assert "on the CPU" in plain.sites[0].choice


# ------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("target", "provider", "words"),
    [
        ("portable", "cuda", "a portable file is for any runtime"),
        ("onnxruntime", "tpu", "unknown provider 'tpu'; expected cpu or cuda"),
        ("portable", "", "unknown provider"),
    ],
)
def test_providers_that_are_refused(target: str, provider: str, words: str, tmp_path: Path) -> None:
    program = torch.export.export(Shards(SHARDS & (Q >= KV)), given())
    with pytest.raises(PolicyError, match=words):
        export_onnx(program, tmp_path / "m.onnx", target=target, provider=provider)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("export_to", "words"),
    [
        ("onnx:portable:cuda", "a portable file is for any runtime"),
        ("onnx:onnxruntime:tpu", "unknown provider"),
        ("onnx:other:cuda", "unknown ONNX target"),
        ("onnx:onnxruntime:cuda:90", "not known"),
    ],
)
def test_providers_that_the_command_refuses(
    export_to: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = run(["optimize", "no/model", "--policy", "exact", "--export", export_to, "-o",
                str(tmp_path / "out")])  # fmt: skip
    assert code == 2
    assert words in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_command_writes_a_file_for_cuda_and_does_not_verify_it_elsewhere(
    tmp_path: Path,
) -> None:
    place = tmp_path / "bert"
    place.mkdir()
    out, model = tmp_path / "out", tiny_bert(place)
    formats = ("--export", "onnx:portable", "--export", "onnx:onnxruntime:cuda")
    words = ("--policy", "window(size=8)", *formats, "--length", "36", "--json", "-o", out)
    done = attn_rewrite("optimize", model, *words)
    assert done.code == 0, done.err
    assert (out / "model.onnx").exists()
    found = json.loads(done.out)["exports"][1]
    assert found["file"] == "model.onnxruntime-cuda.onnx"
    assert (found["target"], found["provider"]) == ("onnxruntime", "cuda")
    assert "nothing ran on CUDA" in found["checked"]
    assert all(site["choice"].endswith("not measured on CUDA") for site in found["sites"])
    checked = attn_rewrite("verify", out)
    assert checked.code == ToolError.exit_code
    assert "did not start CUDAExecutionProvider" in " ".join(checked.err.split())
    assert "Traceback" not in checked.err
