"""Fine-tuning with clipped softmax and with gates, and the outliers of activations before and after.

    python examples/train_without_outliers.py [--steps 300]

A small transformer learns a task where most positions have nothing to attend to, which is what
makes heads push softmax towards exact zeros (Bondarenko et al. 2023, Quantizable Transformers).
The trained model is then fine-tuned three times, equally long: as it is, with
``clipped_softmax`` put in by a policy, and with a gate on each head in the model's own code.  What
is printed: the loss, the largest infinity norm and the kurtosis of the outputs of attention layers,
and the loss with both products in int8.
"""

from __future__ import annotations

import argparse
import copy
import math

import torch
from torch import Tensor, nn
from torch.nn import functional

import attn_rewrite as ar
from attn_rewrite.outliers import infinity_norm, kurtosis

TOKENS, LENGTH, WIDTH, HEADS = 16, 48, 64, 4
ASK, KEY = 1, 2  # a position that asks, and one that answers; every other one is noise
PI = 0.25  # how open a gate is at first, made up for by what multiplies it


class Attention(nn.Module):
    """Self-attention whose heads may have a gate: one number a token and head, from its input."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.gate: nn.Linear | None = None

    def add_gate(self) -> None:
        """A gate that begins as the identity."""
        self.gate = nn.Linear(WIDTH, HEADS)
        nn.init.zeros_(self.gate.weight)
        nn.init.constant_(self.gate.bias, math.log(PI / (1 - PI)))

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        y = functional.scaled_dot_product_attention(q, k, v)
        if self.gate is not None:
            y = y * (self.gate(x).sigmoid() / PI).mT[..., None]
        return self.out(y.transpose(1, 2).reshape(b, n, WIDTH))


class Block(nn.Module):
    """Attention and a small network, both added to their input."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()
        self.one, self.two = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x + self.attention(x))
        return self.two(x + self.mlp(x))


class Model(nn.Module):
    """Two blocks between an embedding and a classifier; norms after the sums, as in BERT."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(2 * TOKENS, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, TOKENS)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.token(ids) + self.place.weight
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def batch(seed: int, rows: int = 16) -> tuple[Tensor, Tensor]:
    """One position in eight asks, and is answered by the token after the only key; others by 0."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, TOKENS, (rows, LENGTH), generator=g)
    ask = torch.rand(rows, LENGTH, generator=g) < 0.125
    at = torch.randint(0, LENGTH, (rows, 1), generator=g)
    answer = torch.randint(3, TOKENS, (rows, 1), generator=g)
    wanted = torch.where(ask, answer, 0)
    ids = torch.where(ask, ASK, ids).scatter(1, at, answer + TOKENS)  # a key names its answer
    return ids, wanted.scatter(1, at, 0)


def loss_of(model: nn.Module, seed: int, rows: int = 16) -> Tensor:
    ids, wanted = batch(seed, rows)
    return functional.cross_entropy(model(ids).flatten(0, 1), wanted.flatten())


def train(model: nn.Module, steps: int, seed: int) -> None:
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(model, seed + step).backward()
        optimizer.step()


def outliers(model: nn.Module, run: nn.Module) -> tuple[float, float]:
    """Largest infinity norm and kurtosis of the outputs of attention layers of ``model``."""
    held: list[Tensor] = []
    hooks = [
        m.register_forward_hook(lambda _, __, y: held.append(y.detach()))
        for m in model.modules()
        if isinstance(m, Attention)
    ]
    with torch.no_grad():
        run(batch(1 << 20, 64)[0])
    for hook in hooks:
        hook.remove()
    return max(map(infinity_norm, held)), max(map(kurtosis, held))


def variants(trained: Model) -> dict[str, tuple[Model, nn.Module]]:
    """Copies to fine-tune: the module with its parameters, and what computes it."""
    plain, clipped, gated = (copy.deepcopy(trained) for _ in range(3))
    for block in gated.blocks:
        block.attention.add_gate()
    rewritten = ar.optimize(clipped, "clipped_softmax(alpha=2.0)", (batch(0)[0],))
    return {"as it is": (plain, plain), "clipped": (clipped, rewritten), "gated": (gated, gated)}


def main(steps: int) -> None:
    torch.manual_seed(0)
    trained = Model().eval()
    train(trained, 2 * steps, seed=0)
    held_out = 1 << 20
    with torch.no_grad():
        print(f"{'':20} loss     inf norm  kurtosis  loss with int8")
        norms = {"trained": report("trained", trained, trained, held_out)}
        for name, (model, run) in variants(trained).items():
            norms[f"{name}, at first"] = report(f"{name}, at first", model, run, held_out)
            with torch.enable_grad():
                train(run, steps, seed=2 * steps)
            norms[name] = report(name, model, run, held_out)


