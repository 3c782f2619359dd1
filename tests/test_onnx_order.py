"""Reordered tokens in an ONNX file: one Gather in, one out, and tables permuted in the file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.inliner
import onnx.numpy_helper
import pytest
import torch
from torch import Tensor, nn

import attn_rewrite as ar
from attn_rewrite import export_onnx

GRID, TOKENS, WIDTH, HEADS = (4, 6), 24, 16, 2
POLICY = "reorder(order='wh', layout='grid=4x6')"


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin


class Block(nn.Module):
    """Attention with rotated queries and keys, and an MLP, with norms and residuals."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 24), nn.GELU(), nn.Linear(24, WIDTH))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        y = self.qkv(self.norms[0](x)).unflatten(-1, (3, HEADS, WIDTH // HEADS))
        q, k, v = y.permute(2, 0, 3, 1, 4)
        q, k = turned(q, cos, sin), turned(k, cos, sin)
        a = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.out(a.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norms[1](x))


class Transformer(nn.Module):
    def __init__(self, layers: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        angles = torch.randn(TOKENS, WIDTH // HEADS // 2).repeat(1, 2)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())
        self.blocks = nn.ModuleList(Block() for _ in range(layers))
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        return self.head(x)


def token_gathers(path: Path) -> list[onnx.NodeProto]:
    """Gathers by a constant order of all tokens, in the file with its functions written out."""
    graph = onnx.inliner.inline_local_functions(onnx.load(path)).graph
    constants = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    constants |= {
        n.output[0]: onnx.numpy_helper.to_array(n.attribute[0].t)
        for n in graph.node
        if n.op_type == "Constant" and n.attribute[0].name == "value"
    }
    return [
        n
        for n in graph.node
        if n.op_type == "Gather" and constants.get(n.input[1], np.zeros(0)).shape == (TOKENS,)
    ]


@pytest.mark.parametrize("layers", [1, 3])
def test_layers_of_one_order_gather_tokens_once_in_and_once_out(
    layers: int, tmp_path: Path
) -> None:
    model, x = Transformer(layers).eval(), torch.randn(2, TOKENS, WIDTH)
    artifact = export_onnx(ar.optimize(model, POLICY, (x,), dynamic_shapes={}), tmp_path / "m.onnx")
    assert len(artifact.sites) == layers
    entry, exit_ = token_gathers(artifact.path)
    assert entry.input[0] == "x"
    graph = onnx.load(artifact.path).graph
    assert graph.output[0].name == exit_.output[0]
    with torch.no_grad():
        wanted = model.double()(x.double()).numpy()
    artifact.verify({"x": x.numpy()}, {"output": wanted}, bound={"output": 1e-5})


def test_rotary_tables_are_permuted_in_the_file(tmp_path: Path) -> None:
    """No table is gathered when the file runs: the tables in it stand in the new order."""
    model = Transformer(2).eval()
    artifact = export_onnx(
        ar.optimize(model, POLICY, (torch.randn(2, TOKENS, WIDTH),), dynamic_shapes={}),
        tmp_path / "m.onnx",
    )
    held = [onnx.numpy_helper.to_array(t) for t in onnx.load(artifact.path).graph.initializer]
    order = np.arange(TOKENS).reshape(GRID).T.ravel()
    for table in (model.cos, model.sin):
        wanted = table.numpy()[order]
        assert any(a.size == wanted.size and np.array_equal(a.reshape(wanted.shape), wanted)
                   for a in held)  # fmt: skip


def test_a_length_that_tables_fix_is_no_length_that_may_change() -> None:
    """With the default shapes the length is traced as a symbol until the tables meet it."""
    model, x = Transformer(2).eval(), torch.randn(2, TOKENS, WIDTH)
    optimized = ar.optimize(model, POLICY, (x,))
    assert not any(s.refusals for s in optimized.report.sites)
    for batch in (1, 3):
        x = torch.randn(batch, TOKENS, WIDTH)
        assert (optimized(x) - model(x)).abs().max() <= 1e-5 * model(x).abs().max()
