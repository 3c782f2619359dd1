"""Models of many families under many policies: every pair exports, loads and agrees with PyTorch.

Agreement is checked by the export itself, against float64.  What is labelled sparse skips: the
scores that a file computes are counted by instrumenting its loops.  Every pair is there at the
sizes of the example, fast enough for every run; `make matrix` adds dynamic batch and lengths.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx
import onnx.inliner
import onnxruntime as ort
import pytest
import torch

import attn_rewrite as ar
from attn_rewrite import export_onnx
from attn_rewrite.backends.onnx.artifact import OnnxArtifact
from attn_rewrite.capture import capture_model

LENGTH, WIDTH = 448, 32
SIZES = {"hidden_size": WIDTH, "num_hidden_layers": 1, "intermediate_size": 48, "vocab_size": 60}
HEADS = {"num_attention_heads": 4}
Model = tuple[torch.nn.Module, dict[str, Any]]


def ids(length: int = LENGTH) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    return {"input_ids": torch.randint(3, 60, (2, length), generator=random)}


def masked(length: int = LENGTH) -> dict[str, torch.Tensor]:
    return {**ids(length), "attention_mask": torch.ones(2, length, dtype=torch.long)}


def text(kind: str, **options: Any) -> Callable[[], Model]:
    """A text model of transformers by the name of its class, without its pooler or cache."""

    def make() -> Model:
        import transformers

        config = getattr(transformers, kind.replace("Model", "Config"))
        sizes = SIZES | HEADS | {"max_position_embeddings": 512, "use_cache": False}
        return getattr(transformers, kind)(config(**sizes, **options)), masked()

    return make


def gpt2() -> Model:
    from transformers import GPT2Config, GPT2Model

    sizes = {"n_positions": 512, "n_embd": WIDTH, "n_layer": 1, "n_head": 4, "use_cache": False}
    return GPT2Model(GPT2Config(vocab_size=60, **sizes)), masked()


def t5() -> Model:
    from transformers import T5Config, T5Model

    sizes = {"d_model": WIDTH, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
    decoder = {"decoder_input_ids": ids(320)["input_ids"]}
    return T5Model(T5Config(vocab_size=60, use_cache=False, **sizes)), ids() | decoder


def vit() -> Model:
    from transformers import ViTConfig, ViTModel

    sizes = {k: v for k, v in SIZES.items() if k != "vocab_size"} | HEADS
    model = ViTModel(ViTConfig(image_size=76, patch_size=4, **sizes), add_pooling_layer=False)
    return model, {"pixel_values": torch.randn(2, 3, 76, 76)}


def dit() -> Model:
    from diffusers import DiTTransformer2DModel

    sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1, "sample_size": 40}
    other = {"in_channels": 4, "patch_size": 2, "num_embeds_ada_norm": 10, "norm_num_groups": 1}
    example = {
        "hidden_states": torch.randn(2, 4, 40, 40),
        "timestep": torch.tensor([3, 5]),
        "class_labels": torch.tensor([1, 2]),
    }
    return DiTTransformer2DModel(**sizes, **other), example


class Eager(torch.nn.Module):
    """Scores, mask and softmax spelled out, with a bias per head that falls with the distance."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = torch.nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, s, _ = x.shape
        q, k, v = (t.view(b, s, 4, 8).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        at = torch.arange(s)
        slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625]).view(4, 1, 1)
        score = q @ k.mT * 8**-0.5 - slopes * (at[:, None] - at).abs()
        score = score.masked_fill(at[:, None] < at, -math.inf)
        return (score.softmax(-1) @ v).transpose(1, 2).reshape(b, s, WIDTH)


def eager() -> Model:
    return Eager(), {"x": torch.randn(2, LENGTH, WIDTH)}


def encoder() -> Model:
    layer = torch.nn.TransformerEncoderLayer(WIDTH, 4, 48, batch_first=True, dropout=0.0)
    return layer, {"src": torch.randn(2, LENGTH, WIDTH)}


MODELS: dict[str, Callable[[], Model]] = {
    "bert": text("BertModel"),
    "gpt2": gpt2,
    "llama": text("LlamaModel", num_key_value_heads=2),
    "qwen3": text("Qwen3Model", num_key_value_heads=2, head_dim=8),
    "mistral": text("MistralModel", num_key_value_heads=2, sliding_window=24),
    "gemma2": text("Gemma2Model", num_key_value_heads=2, head_dim=8, sliding_window=24),
    "mpnet": text("MPNetModel"),
    "t5": t5,
    "vit": vit,
    "dit": dit,
    "eager": eager,
    "encoder": encoder,
}
POLICIES = {
    "exact": "exact",
    "window": "window(size=16)",
    "sinks": "window(size=12, sinks=3)",
    "chunked": "chunked(size=32)",
    "longformer": "longformer(window=16)",
    "bigbird": "bigbird(block=16, global_blocks=1, random=1)",
    "int8": "int8",
    "both": "window(size=16) | int8",
}
SPARSE = [name for name in POLICIES if name not in ("exact", "int8")]
PAIRS = [(m, p) for m in MODELS for p in POLICIES]


def scores_of(artifact: OnnxArtifact, example: dict[str, Any]) -> int:
    """The scores that the loops of a portable file compute for ``example``, counted as it runs."""
    proto = onnx.inliner.inline_local_functions(onnx.load(artifact.path))
    scans = [n for n in proto.graph.node if n.op_type == "Scan"]
    for i, scan in enumerate(scans):
        body = next(a.g for a in scan.attribute if a.name == "body")
        product = next(n for n in body.node if n.op_type in ("MatMul", "MatMulInteger"))
        body.node.append(onnx.helper.make_node("Size", [product.output[0]], [f"scores_{i}"]))
        body.output.append(onnx.helper.make_tensor_value_info(f"scores_{i}", 7, []))
        axes = next(a for a in scan.attribute if a.name == "scan_output_axes")
        axes.ints.append(0)
        scan.output.append(f"all_scores_{i}")
        proto.graph.output.append(
            onnx.helper.make_tensor_value_info(f"all_scores_{i}", 7, ["steps"])
        )
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    wanted = {v.name for v in session.get_inputs()}
    feed = {n: t.numpy() for n, t in example.items() if n in wanted}
    counts = session.run([f"all_scores_{i}" for i in range(len(scans))], feed)
    return int(sum(c.sum() for c in counts))


@pytest.fixture(scope="module", autouse=True)
def translations_read_once() -> Iterator[None]:
    """torch reads its 500 translations anew at every export, a third of the time of a small one."""
    import onnxscript._framework_apis.torch_2_5 as apis

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(apis, "get_torchlib_ops", functools.cache(apis.get_torchlib_ops))
        yield


@functools.cache
def captured(model: str) -> tuple[torch.export.ExportedProgram, dict[str, Any]]:
    """A model at the sizes of its example, captured once for all policies."""
    torch.manual_seed(0)
    made, example = MODELS[model]()
    return capture_model(made.eval(), (), example, dynamic_shapes={}).program, example


@pytest.mark.slow
@pytest.mark.parametrize(("model", "policy"), PAIRS)
def test_a_model_under_a_policy(model: str, policy: str, tmp_path: Path) -> None:
    program, example = captured(model)
    check(ar.optimize(program, POLICIES[policy], (), example), example, policy, tmp_path / "m.onnx")


@pytest.mark.matrix
@pytest.mark.parametrize(("model", "policy"), PAIRS)
def test_a_model_under_a_policy_at_any_size(model: str, policy: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    made, example = MODELS[model]()
    check(
        ar.optimize(made.eval(), POLICIES[policy], (), example),
        example, policy, tmp_path / "m.onnx",
    )  # fmt: skip


def check(done: Any, example: dict[str, Any], policy: str, place: Path) -> None:
    """The export agrees, has every rewritten site, and skips where the policy is sparse."""
    artifact = export_onnx(done, place)
    assert artifact.errors, "the export compares with the program"
    assert done.report.sites
    rewritten = {s.name for s in done.report.sites if s.status in ("rewritten", "unbudgeted")}
    assert rewritten or policy != "exact"
    forms = {s.name: s for s in artifact.sites}
    assert rewritten <= set(forms)
    if policy not in SPARSE:
        return
    sparse = [forms[name] for name in rewritten]
    assert all(s.skips for s in sparse), [s.detail for s in sparse]
    if rewritten:
        dense = sum(2 * s.hq * size(s.q_len) * size(s.kv_len) for s in done.sites)
        assert 0 < scores_of(artifact, example) < dense


def size(extent: Any) -> int:
    """An extent in the example: dynamic ones are the length of the text."""
    return extent if isinstance(extent, int) else LENGTH


def test_the_matrix_is_whole() -> None:
    assert len(MODELS) >= 12
    assert len(POLICIES) >= 8
    assert len(set(PAIRS)) == len(MODELS) * len(POLICIES)
