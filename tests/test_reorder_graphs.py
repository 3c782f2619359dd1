"""Gathers of reordered Sites in whole graphs: they cancel where that is right, and only there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import attn_rewrite as ar
from attn_rewrite.report import Report

GRID, TOKENS, WIDTH = "grid=3x4", 12, 8
POLICY = f"reorder(order='wh', layout='{GRID}')"
Between = Callable[[Tensor], Tensor]


class Block(nn.Module):
    """Attention and MLP with residuals and norms; ``between`` stands before the attention."""

    def __init__(self, between: Between | None = None, causal: bool = False) -> None:
        super().__init__()
        self.between, self.causal = between, causal
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 16), nn.GELU(), nn.Linear(16, WIDTH))

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        y = x if self.between is None else self.between(x)
        y = self.norms[0](y)
        if condition is not None:
            shift, scale = condition.chunk(2, -1)
            y = y * (1 + scale[:, None]) + shift[:, None]
        q, k, v = self.qkv(y).unflatten(-1, (3, 2, WIDTH // 2)).permute(2, 0, 3, 1, 4)
        a = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.out(a.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norms[1](x))


class Model(nn.Module):
    """A plain block at either end, and one for each of ``betweens``."""

    def __init__(self, *betweens: Between | None, causal: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.places = nn.Parameter(torch.randn(TOKENS, WIDTH))
        inner = [Block(between, causal) for between in betweens or (None,)]
        self.blocks = nn.ModuleList([Block(), *inner, Block()])
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.places
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def reordered(model: nn.Module, *inputs: Tensor, policy: str | ar.Policy = POLICY) -> Report:
    """The report; the rewritten model computes what the model does."""
    model.eval()
    fast = ar.optimize(model, policy, inputs, dynamic_shapes={}, verify=False)
    other = tuple(torch.randn_like(t) for t in inputs)
    with torch.no_grad():
        for given in (inputs, other):
            torch.testing.assert_close(fast(*given), model(*given), rtol=0, atol=2e-5)
    return fast.report


def tokens(count: int = TOKENS) -> Tensor:
    return torch.randn(2, count, WIDTH)


def test_one_order_permutes_at_entry_and_exit() -> None:
    found = reordered(Model(), tokens()).gathers
    # The embedded positions are a table of their own; the sum is gathered, or both terms are.
    assert found["at_sites"] == 12
    assert found["left"] == 2
    assert found["of_tables"] <= 1


class Conditioned(nn.Module):
    """Modulated norms, rotated positions, text beside the grid, and a pooled output."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.text, self.condition = nn.Linear(5, WIDTH), nn.Linear(3, 2 * WIDTH)
        self.first = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.final = nn.LayerNorm(WIDTH)

    def forward(self, image: Tensor, text: Tensor, time: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = torch.cat([self.first.expand(len(image), -1, -1), self.text(text), image], 1)
        for block in self.blocks:
            x = block(x, self.condition(nn.functional.silu(time)))
        x = self.final(x)
        return x[:, 0], x[:, 4:], x[:, 4:].mean(1)


def test_text_class_token_and_modulation() -> None:
    torch.manual_seed(0)
    inputs = (tokens(), torch.randn(2, 3, 5), torch.randn(2, 3))
    policy = f"reorder(order='wh', layout='{GRID},text=4')"
    found = reordered(Conditioned(), *inputs, policy=policy).gathers
    assert found["at_sites"] == 12
    assert found["left"] <= 4  # in once; the slices of the output at most each


def _first_row_cleared(x: Tensor) -> Tensor:
    y = x.clone()
    y[:, 0] = 0.0
    return y


def _added_in_place(x: Tensor) -> Tensor:
    y = x * 1.0
    y += torch.arange(TOKENS).view(-1, 1) * 0.1
    y[:, 3:7] *= 2.0
    return y


def _windows(x: Tensor) -> Tensor:
    return x.unflatten(1, (3, 4)).flip(2).flatten(1, 2)


_MIX = torch.linspace(-1, 1, TOKENS * TOKENS).view(TOKENS, TOKENS)
_KERNEL = torch.linspace(-1, 1, WIDTH * 3).view(WIDTH, 1, 3)

# What is not the same for every token, or looks at more than one.
DECOYS: dict[str, Between] = {
    "convolution": lambda x: nn.functional.conv1d(x.mT, _KERNEL, padding=1, groups=WIDTH).mT,
    "running sum": lambda x: x.cumsum(1),
    "running maximum": lambda x: x.cummax(1).values,
    "mean over tokens": lambda x: x - x.mean(1, keepdim=True) + x[:, :1],
    "softmax over tokens": lambda x: x.softmax(1) * torch.arange(TOKENS)[:, None],
    "norm over tokens": lambda x: nn.functional.layer_norm(x.mT, (TOKENS,)).mT,
    "mixing tokens": lambda x: _MIX @ x,
    "mixing tokens from the right": lambda x: (x.mT @ _MIX).mT,
    "linear over tokens": lambda x: nn.functional.linear(x.mT, _MIX).mT,
    "einsum over tokens": lambda x: torch.einsum("nm,bmd->bnd", _MIX, x),
    "shift by one": lambda x: nn.functional.pad(x[:, :-1], (0, 0, 1, 0)),
    "roll": lambda x: x.roll(2, 1),
    "flip": lambda x: x.flip(1),
    "reversed half": lambda x: torch.cat([x[:, 6:], x[:, :6]], 1),
    "windows": _windows,
    "places": lambda x: x + torch.arange(TOKENS).view(-1, 1),
    "chosen tokens": lambda x: x[:, torch.arange(TOKENS).roll(3)],
    "sorted": lambda x: x.sort(1).values,
    "a row written": _first_row_cleared,
    "written in place": _added_in_place,
    "triangle": lambda x: x + (x @ x.mT).tril() @ x * 0.1,
    "tokens as width": lambda x: x.flatten(1).view(-1, WIDTH, TOKENS).mT.contiguous(),
    "one token for all": lambda x: x + x[:, 5:6],
    "strided": lambda x: x + x[:, ::2].repeat_interleave(2, 1),
    "unfolded": lambda x: nn.functional.pad(x, (0, 0, 1, 1)).unfold(1, 3, 1).sum(-1),
    "scattered": lambda x: x.index_add(1, torch.tensor([4]), x[:, :1]),
    "masked": lambda x: torch.where(torch.arange(TOKENS)[:, None] > 5, x, 0.0),
}


@pytest.mark.parametrize("first", range(0, len(DECOYS), 5))
def test_operators_that_see_the_order_see_the_models(first: int) -> None:
    reordered(Model(*list(DECOYS.values())[first : first + 5]), tokens())


# The same for every token: the order may stay.
TOKEN_WISE: dict[str, Between] = {
    "elementwise": lambda x: torch.where(x > 0, x, x * 0.1).clamp(-3, 3) + x.sigmoid(),
    "along the width": lambda x: x.cumsum(-1) + x.softmax(-1) + x.mean(-1, keepdim=True),
    "split and joined": lambda x: torch.cat([*x.chunk(2, -1)][::-1], -1),
    "in place": lambda x: (x * 1.0).mul_(2.0).add_(1.0),
    "heads": lambda x: x.unflatten(-1, (2, 4)).transpose(1, 2).transpose(1, 2).flatten(2),
}


def test_operators_that_do_not_see_the_order_keep_it() -> None:
    found = reordered(Model(*TOKEN_WISE.values()), tokens()).gathers
    assert found["at_sites"] == 4 * (2 + len(TOKEN_WISE))
    assert found["left"] == 2


def test_an_attention_in_the_middle_that_knows_positions() -> None:
    rules = f"""
[[rule]]
where = {{ layer = "blocks.1" }}
apply = "exact"

[[rule]]
apply = "{POLICY}"
"""
    found = reordered(Model(causal=True), tokens(), policy=ar.Policy.from_toml(rules)).gathers
    assert found["at_sites"] == 8


def test_orders_that_differ_from_layer_to_layer() -> None:
    rules = f"""
[[rule]]
where = {{ layer = "blocks.1" }}
apply = "reorder(tile=[3, 2], layout='{GRID}')"

[[rule]]
where = {{ layer = "blocks.2" }}
apply = "reorder(order=['wh', 'hw'], layout='{GRID}')"

[[rule]]
apply = "{POLICY}"
"""
    found = reordered(Model(), tokens(), policy=ar.Policy.from_toml(rules)).gathers
    assert 2 <= found["left"] <= found["at_sites"]


def test_saved_loaded_and_replayed(tmp_path: Path) -> None:
    model, x = Model().eval(), tokens()
    fast = ar.optimize(model, POLICY, (x,), dynamic_shapes={})
    assert all(s.implementation is not None for s in fast.report.sites)
    ar.save(fast, tmp_path / "out")
    again = ar.load(tmp_path / "out")
    replayed = ar.optimize(model, "exact", (x,), plan=fast.plan, dynamic_shapes={})
    assert again.report.gathers == replayed.report.gathers == fast.report.gathers
    with torch.no_grad():
        for one in (again, replayed):
            torch.testing.assert_close(one(x), model(x), rtol=0, atol=2e-5)


def test_a_length_that_may_change_is_refused() -> None:
    found = ar.optimize(Model(), POLICY, (tokens(),), dynamic_shapes=None, verify=False)
    # The table of places fixes the length, so nothing is dynamic there.
    assert found.report.gathers["left"] == 2
    free = ar.optimize(Block(), POLICY, (tokens(),), verify=False).report
    assert {r.code for r in free.all_refusals()} == {"reorder-dynamic"}
