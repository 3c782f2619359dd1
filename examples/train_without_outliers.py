"""Fine-tuning with clipped softmax and with gates: outliers of activations before and after.

    python examples/train_without_outliers.py [--steps 40]

A small transformer learns a task where most positions have nothing to attend to, which is what
makes heads push softmax towards exact zeros (Bondarenko et al. 2023, Quantizable Transformers).
The trained model is then fine-tuned three times, equally long: as it is, with ``clipped_softmax``
and with ``gated`` put in by a policy; the gates are new parameters of the rewritten model.  What is
printed: the loss, the largest infinity norm and the kurtosis of the outputs of attention layers,
before and after fine-tuning and with int8 products.  A model this small, trained this briefly, has
no outliers to lose: what is shown is that both rewrites train, and how it is measured.
"""

from __future__ import annotations

import argparse
import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

import attn_rewrite as ar
from attn_rewrite.outliers import infinity_norm, kurtosis

TOKENS, LENGTH, WIDTH, HEADS = 12, 24, 32, 4
ASK, KEY = 1, 2  # a position that asks, and one that answers; every other one is noise
# What is put into the trained model, and the policy that quantises the result.
VARIANTS = {
    "as it is": ("exact", "int8(pv=true)"),
    "clipped": ("clipped_softmax(alpha=2.0)", "int8 | clipped_softmax(alpha=2.0)"),
    "gated": ("gated", "gated | int8(pv=true)"),
}
HELD_OUT = 1 << 20


class Attention(nn.Module):
    """Self-attention."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        y = functional.scaled_dot_product_attention(q, k, v)
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

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        attended = self.attention(x)
        x = self.one(x + attended)
        return self.two(x + self.mlp(x)), attended


class Model(nn.Module):
    """Two blocks between an embedding and a classifier; norms after the sums, as in BERT."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(2 * TOKENS, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, TOKENS)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Logits, and the outputs of the attention layers."""
        x, seen = self.token(ids) + self.place.weight, []
        for block in self.blocks:
            x, attended = block(x)
            seen.append(attended)
        return self.head(x), torch.stack(seen)


def batch(seed: int, rows: int = 8) -> tuple[Tensor, Tensor]:
    """One position in eight asks, and is answered by the token after the only key; others by 0."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, TOKENS, (rows, LENGTH), generator=g)
    ask = torch.rand(rows, LENGTH, generator=g) < 0.125
    at = torch.randint(0, LENGTH, (rows, 1), generator=g)
    answer = torch.randint(3, TOKENS, (rows, 1), generator=g)
    wanted = torch.where(ask, answer, 0)
    ids = torch.where(ask, ASK, ids).scatter(1, at, answer + TOKENS)  # a key names its answer
    return ids, wanted.scatter(1, at, 0)


def loss_of(logits: Tensor, wanted: Tensor) -> Tensor:
    """Mean cross entropy over all positions."""
    return functional.cross_entropy(logits.flatten(0, 1), wanted.flatten())


def train(run: nn.Module, steps: int, seed: int) -> None:
    """Adam on batches of their own."""
    optimizer = torch.optim.Adam(run.parameters(), 2e-3)
    for step in range(steps):
        ids, wanted = batch(seed + step)
        optimizer.zero_grad()
        loss_of(run(ids)[0], wanted).backward()
        optimizer.step()


@dataclass(frozen=True)
class Measured:
    """On held-out data: loss, largest infinity norm and kurtosis of attention outputs."""

    loss: float
    norm: float
    kurtosis: float

    @classmethod
    def of(cls, run: nn.Module) -> Measured:
        """Of a model as it computes now."""
        ids, wanted = batch(HELD_OUT, 64)
        with torch.no_grad():
            logits, seen = run(ids)
            loss = float(loss_of(logits, wanted))
        return cls(loss, max(map(infinity_norm, seen)), max(map(kurtosis, seen)))

    def __str__(self) -> str:
        return f"{self.loss:8.4f} {self.norm:9.3f} {self.kurtosis:9.3f}"


def fine_tuned(trained: Model, policies: tuple[str, str], steps: int) -> tuple[Measured, ...]:
    """At first, fine-tuned, and quantised."""
    rewritten, quantised = policies
    example = (batch(0)[0],)
    model = copy.deepcopy(trained)
    run = ar.optimize(model, rewritten, example)
    before = Measured.of(run)
    train(run, steps, seed=3 * steps)
    narrow = ar.optimize(model, quantised, example)
    narrow.load_state_dict(run.state_dict())  # gates are no parameters of the model
    return before, Measured.of(run), Measured.of(narrow)


def main(steps: int) -> None:
    torch.manual_seed(0)
    trained = Model().eval()
    train(trained, 3 * steps, seed=0)
    start = Measured.of(trained)
    print(f"{'':22} {'loss':>8} {'inf norm':>9} {'kurtosis':>9}")
    print(f"{'trained':22} {start}")
    for name, policies in VARIANTS.items():
        before, after, quantised = fine_tuned(trained, policies, steps)
        for when, found in (("at first", before), ("fine-tuned", after), ("int8", quantised)):
            print(f"{name + ', ' + when:22} {found}")
        if name != "clipped":  # a gate begins as the identity
            assert abs(before.loss - start.loss) < 1e-4
        assert after.loss < start.loss, "fine-tuning mends what the rewrite changed, and more"
        assert abs(quantised.loss - after.loss) < 0.02


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=40)
    main(parser.parse_args().steps)
