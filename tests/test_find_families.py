"""Families of attention by name, near misses, and the work the finder does."""

from __future__ import annotations

import gc
import itertools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import pytest
import torch
from torch import Tensor, fx, nn

from attn_rewrite import find_attention
from attn_rewrite.cascade import interpret
from attn_rewrite.passes.canonicalize import canonicalize
from attn_rewrite.passes.find import find
from attn_rewrite.verify import canonical_inputs, canonical_output
from tests.test_find_spellings import Module, capture, findings

WIDTH, HEADS, LENGTH = 16, 4, 6


class Heads(nn.Module):
    """Projections to [3, batch, heads, length, width]; subclasses attend."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.mix = nn.Linear(HEADS, HEADS)
        self.gate = nn.Parameter(torch.ones(HEADS, 1, 1))
        self.register_buffer("distances", torch.randn(1, HEADS, LENGTH, LENGTH))

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, HEADS, -1).permute(2, 0, 3, 1, 4).unbind(0)
        return self.attend(q, k, v)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise AssertionError("a subclass attends")


class TalkingBefore(Heads):
    def attend(self, q, k, v):
        s = self.mix((q @ k.mT).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return s.softmax(-1) @ v


class TalkingAfter(Heads):
    def attend(self, q, k, v):
        p = (q @ k.mT).softmax(-1)
        return self.mix(p.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) @ v


class GatedSum(Heads):
    def attend(self, q, k, v):
        gate = self.gate.sigmoid()
        p = (1 - gate) * (q @ k.mT).softmax(-1) + gate * self.distances.softmax(-1)
        return (p / p.sum(-1, keepdim=True)) @ v


class KeySoftmax(Heads):
    def attend(self, q, k, v):
        return q @ (k.softmax(2).mT @ v)


class BothSoftmax(Heads):
    def attend(self, q, k, v):
        context = torch.einsum("bhnd,bhne->bhde", k.softmax(dim=2), v)
        return torch.einsum("bhnd,bhde->bhne", q.softmax(dim=-1), context)


class Channels(Heads):
    def attend(self, q, k, v):
        q, k = (nn.functional.normalize(x, dim=2) for x in (q, k))
        return ((q.mT @ k).softmax(-1) @ v.mT).mT


CASES = {
    TalkingBefore: ("softmax", "talking-heads"),
    TalkingAfter: ("softmax", "talking-heads"),
    GatedSum: ("softmax", "probabilities-summed"),
    KeySoftmax: ("linear", "linear-attention"),
    BothSoftmax: ("linear", "linear-attention"),
    Channels: ("channel", None),
}


@pytest.mark.parametrize("kind", CASES, ids=lambda k: k.__name__)
def test_family(kind: type[nn.Module]) -> None:
    found = findings(kind(), (torch.randn(2, LENGTH, WIDTH),))
    (site,) = found.sites
    family, code = CASES[kind]
    assert (site.family, [r.code for r in site.refusals]) == (family, [code] if code else [])
    assert (site.hq, site.kind) == (HEADS, "self")
    lengths = (WIDTH // HEADS,) * 2 if family == "channel" else (LENGTH,) * 2
    assert (site.q_len, site.kv_len) == lengths
    assert (site.d_qk, site.d_v) == (
        (LENGTH,) * 2 if family == "channel" else (WIDTH // HEADS,) * 2
    )


class Excitation(nn.Module):
    """Attention pooling over positions, as a gate of the channels: no query."""

    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * (self.score(x).softmax(1).mT @ x)


class SoftMoE(nn.Module):
    """Dispatch and combine weights from one product with parameters; experts between."""

    def __init__(self) -> None:
        super().__init__()
        self.slots = nn.Linear(WIDTH, 5)
        self.expert = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        logits = self.slots(x)
        inside = self.expert(logits.softmax(1).mT @ x)
        return logits.softmax(2) @ inside


def _mixed_axes(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The probabilities are transposed: the product contracts queries."""
    return (q @ k.mT).softmax(-1).mT @ v


def _padded_axis(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Normalised over keys and padding, contracted over the keys alone."""
    p = nn.functional.pad(q @ k.mT, (0, 3)).softmax(-1)
    return p[..., :-3] @ v


def _distillation(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The map itself is the result."""
    return (q @ k.mT).softmax(-1) - (k @ v.mT).softmax(-1)


@pytest.mark.parametrize("decoy", [Excitation, SoftMoE], ids=lambda k: k.__name__)
def test_decoy_modules(decoy: type[nn.Module]) -> None:
    found = findings(decoy(), (torch.randn(2, LENGTH, WIDTH),))
    assert not found.sites
    assert found.refusals
    assert all(r.code and r.reason and r.node and r.source for r in found.refusals)


@pytest.mark.parametrize(
    "decoy", [_mixed_axes, _padded_axis, _distillation], ids=lambda f: f.__name__
)
def test_decoy_functions(decoy) -> None:
    found = findings(decoy)
    assert not found.sites
    assert found.refusals


def _deep(layers: int) -> fx.GraphModule:
    """A captured attention layer repeated: layer n reads what layer n - 1 gives."""

    def layer(x: Tensor) -> Tensor:
        q, k, v = x * 2.0, x + 1.0, x - 1.0
        s = q @ k.mT
        s.div_(4.0)
        keep = torch.ones(6, 6, dtype=torch.bool).tril()
        p = s.masked_fill(~keep, -torch.inf).softmax(-1)
        x = x + (p @ v)
        for _ in range(15):  # what is no attention in a layer
            x = (x * 1.01 + 0.1).tanh()
        return x

    one = capture(Module(layer), (torch.randn(2, 4, 6, 8),))
    graph = fx.Graph()
    value = graph.node_copy(next(n for n in one.graph.nodes if n.op == "placeholder"))
    for _ in range(layers):
        copies = {n: value for n in one.graph.nodes if n.op == "placeholder"}
        for node in one.graph.nodes:
            if node.op in ("call_function", "get_attr"):
                copies[node] = graph.node_copy(node, copies.__getitem__)
        output = next(n for n in one.graph.nodes if n.op == "output").args[0]
        value = copies[output[0] if isinstance(output, (list, tuple)) else output]
    graph.output(value)
    return fx.GraphModule(one, graph)


@contextmanager
def _counted_calls() -> Iterator[Iterator[int]]:
    """Calls of Python and C functions while it is open: work that no busy machine changes.

    Nothing is collected meanwhile: what earlier tests left behind has finalisers, and hypothesis is
    called at every collection.
    """
    made = itertools.count()

    def count(frame: FrameType, event: str, of: object) -> None:
        if event in ("call", "c_call"):
            next(made)

    gc.collect()
    gc.disable()
    sys.setprofile(count)
    try:
        yield made
    finally:
        sys.setprofile(None)
        gc.enable()


def test_work_is_linear_in_the_graph() -> None:
    """Every further layer takes as many calls as the one before it, to one in a thousand."""
    calls = []
    for layers in (1, 10, 20, 30):  # the first fills the caches
        module = _deep(layers)
        with _counted_calls() as made:
            found = find(canonicalize(module))
        calls.append(next(made))
        assert len(found.sites) == layers
    assert calls[3] - calls[2] == pytest.approx(calls[2] - calls[1], rel=1e-3)


@pytest.mark.matrix
def test_a_graph_of_100_000_nodes() -> None:
    module = _deep(1800)
    assert len(module.graph.nodes) > 100_000
    assert len(find(canonicalize(module)).sites) == 1800


class ImageAttention(nn.Module):
    """Keys and queries of an image [b, c, h, w], flattened at the products; one head, no head axis."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Conv2d(WIDTH, 3 * WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=1)
        p = (q.flatten(2).mT @ k.flatten(2)).softmax(-1)
        return (v.flatten(2) @ p.mT).view_as(x)


def test_rows_and_columns_of_an_image_are_positions() -> None:
    found = findings(ImageAttention(), (torch.randn(2, WIDTH, 5, 7),))
    (site,) = found.sites
    assert (site.hq, site.hkv, site.q_len, site.kv_len, site.d_qk) == (1, 1, 35, 35, WIDTH)
    axes = [f.axis for f in site.factors]
    assert len(axes) == len(set(axes))


class Values(fx.Interpreter):
    """Runs a graph and keeps the value of every node."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.values: dict[fx.Node, object] = {}

    def run_node(self, n: fx.Node) -> object:
        self.values[n] = super().run_node(n)
        return self.values[n]


@pytest.mark.parametrize("kind", [KeySoftmax, BothSoftmax, Channels], ids=lambda k: k.__name__)
def test_other_families_are_raised_to_what_they_compute(kind: type[nn.Module]) -> None:
    """The oracle of the raised cascade, on the operands of the Site, is the value of its output."""
    x = torch.randn(2, LENGTH, WIDTH, dtype=torch.float64)
    (site,) = findings(kind().double(), (x,)).sites
    run = Values(site.graph)
    run.run(x)
    found = interpret(site.cascade, canonical_inputs(site, run.values))["AV"]
    wanted = run.values[site.output.node]
    torch.testing.assert_close(canonical_output(site, run.values, found), wanted)


class Blocks(nn.Module):
    """Block-local attention as LongT5 writes it: a length padded to blocks, whose number is
    symbolic."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(16, 16, bias=False) for _ in range(3))

    def forward(self, x):
        pad = -x.shape[1] % 4
        q, k, v = (
            nn.functional.pad(m(x).view(*x.shape[:2], 2, 8), (0, 0, 0, 0, 0, pad))
            for m in (self.q, self.k, self.v)
        )
        count = q.shape[1] // 4
        q, k, v = (t.reshape(x.shape[0], count, 4, 2, 8) for t in (q, k, v))
        maps = torch.einsum("...qhd,...khd->...hqk", q, k).softmax(-1)
        return torch.einsum("...hqk,...khd->...qhd", maps, v)


def test_heads_are_seen_behind_blocks_of_a_symbolic_number() -> None:
    auto = torch.export.Dim.AUTO
    program = torch.export.export(
        Blocks().eval(), (torch.randn(2, 10, 16),), dynamic_shapes=({0: auto, 1: auto},)
    )
    (site,) = find(canonicalize(program.module())).sites
    assert (site.hq, site.hkv, site.d_qk) == (2, 2, 8)
    assert site.rewritable


class LowRank(nn.Module):
    """Queries and keys that are projections of projections, as in multi-head latent attention;
    the tables of the rotation are made without gradients, as model libraries make them."""

    def __init__(self) -> None:
        super().__init__()
        self.q_down, self.q_up = nn.Linear(WIDTH, 8), nn.Linear(8, WIDTH)
        self.kv_down, self.kv_up = nn.Linear(WIDTH, 8), nn.Linear(8, 2 * WIDTH)
        self.q_norm, self.kv_norm = nn.RMSNorm(8), nn.RMSNorm(8)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q = self.q_up(self.q_norm(self.q_down(x)))
        k, v = self.kv_up(self.kv_norm(self.kv_down(context))).chunk(2, -1)
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (q, k, v))
        return ((self._turned(q) @ self._turned(k).mT) / 2).softmax(-1) @ v

    def _turned(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            angles = torch.arange(x.shape[-2])[:, None] * torch.tensor([1.0, 0.1])
            cos, sin = angles.cos(), angles.sin()
        even, odd = x[..., ::2], x[..., 1::2]
        return torch.cat([even * cos - odd * sin, odd * cos + even * sin], -1)


class GivenTables(nn.Module):
    """A layer alone: the tables of its rotation are arguments, with a batch and a length."""

    def __init__(self, cross: bool) -> None:
        super().__init__()
        self.cross = cross
        self.q, self.kv = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, x: Tensor, context: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = nn.functional.layer_norm(x, (WIDTH,))
        k, v = self.kv(context if self.cross else x).chunk(2, -1)
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (self.q(x), k, v))
        q, k = (
            t * cos[:, None] + torch.cat([-t[..., 2:], t[..., :2]], -1) * sin[:, None]
            for t in (q, k)
        )
        return nn.functional.scaled_dot_product_attention(q, k, v)


class WithoutGradients(GivenTables):
    """A frozen layer: its weights and the tables are inputs of a graph of its own."""

    def __init__(self) -> None:
        super().__init__(False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        cos, sin = cos * 2, sin * 2
        with torch.no_grad():
            y = super().forward(x, x, cos, sin)
        return y.transpose(1, 2).flatten(2) + x


class InABranch(GivenTables):
    def __init__(self) -> None:
        super().__init__(False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        def attend(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
            return GivenTables.forward(self, x, x, cos, sin).transpose(1, 2).flatten(2)

        def pass_by(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
            return x * 2.0

        return torch.cond(x.sum() > 0, attend, pass_by, (x, cos, sin))


class LowRankSelf(LowRank):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x, x)


class Reduced(Heads):
    """Keys of an image that a strided convolution made smaller (PVT, Segformer)."""

    def __init__(self) -> None:
        super().__init__()
        self.smaller = nn.Conv2d(WIDTH, WIDTH, 2, 2)
        self.norm = nn.LayerNorm(WIDTH)
        self.q, self.kv = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, image: Tensor) -> Tensor:
        x = self.norm(image.flatten(2).mT)
        y = x.mT.unflatten(-1, image.shape[2:])
        y = self.norm(self.smaller(y).flatten(2).mT)
        q, (k, v) = self.q(x), self.kv(y).chunk(2, -1)
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (q, k, v))
        return (q @ k.mT).softmax(-1) @ v


class NoResidual(nn.Module):
    """The result of an attention asks the tokens it was made of: other queries than the keys."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        read = (q @ k.mT).softmax(-1) @ v
        return (self.q(read) @ k.mT).softmax(-1) @ v


class TwoStreams(nn.Module):
    """Image and text ask image and text; the image's queries and keys are rotated along three axes,
    by tables that are longer to make than all the rest (HunyuanVideo)."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(24, 3 * 24), nn.Linear(24, 3 * 24)
        self.norm = nn.RMSNorm(12)

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        streams = [
            f(x).unflatten(-1, (3, 2, 12)) for f, x in ((self.image, image), (self.text, text))
        ]
        cos, sin = self._tables(2, 2, 3)
        parts = []
        for n in range(2):
            x, other = (self.norm(s[:, :, n]) for s in streams)
            even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
            parts.append(
                torch.cat([x * cos + torch.stack([-odd, even], -1).flatten(3) * sin, other], 1)
            )
        v = torch.cat([s[:, :, 2] for s in streams], 1)
        q, k, v = (t.transpose(1, 2) for t in (*parts, v))
        return nn.functional.scaled_dot_product_attention(q, k, v)

    def _tables(self, *grid: int) -> tuple[Tensor, Tensor]:
        places = torch.stack(torch.meshgrid(*(torch.arange(n) * 1.0 for n in grid), indexing="ij"))
        cos, sin = [], []
        for axis in range(3):
            steps = 1.0 / 10000.0 ** (torch.arange(0, 4, 2)[:2].float() / 4)
            angles = torch.outer(places[axis].reshape(-1), steps)
            cos.append(angles.cos().repeat_interleave(2, dim=1).float())
            sin.append(angles.sin().repeat_interleave(2, dim=1).float())
        return torch.cat(cos, 1)[None, :, None], torch.cat(sin, 1)[None, :, None]


class Probe(nn.Module):
    """One learned query for every sequence (SigLIP's head), or queries that are tokens."""

    def __init__(self, queries: int) -> None:
        super().__init__()
        self.probe = nn.Parameter(torch.randn(1, queries, WIDTH))
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        probe = self.probe.repeat(x.shape[0], 1, 1)
        return self.attention(probe, x, x, need_weights=False)[0]


class FirstToken(Probe):
    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x[:, :1], x, x, need_weights=False)[0]


@pytest.mark.parametrize(
    ("model", "shapes", "kinds", "rope"),
    [
        (LowRankSelf(), [(2, LENGTH, WIDTH)], ["self"], True),
        (LowRank(), [(2, LENGTH, WIDTH), (2, LENGTH, WIDTH)], ["cross"], True),
        (LowRank(), [(2, LENGTH, WIDTH), (2, 9, WIDTH)], ["cross"], True),
        (GivenTables(False), [(2, LENGTH, WIDTH)] * 2 + [(2, LENGTH, 4)] * 2, ["self"], True),
        (GivenTables(True), [(2, LENGTH, WIDTH)] * 2 + [(2, LENGTH, 4)] * 2, ["cross"], True),
        (WithoutGradients(), [(2, LENGTH, WIDTH)] + [(2, LENGTH, 4)] * 2, ["self"], True),
        (InABranch(), [(2, LENGTH, WIDTH)] + [(2, LENGTH, 4)] * 2, ["self"], True),
        (Reduced(), [(2, WIDTH, 4, 4)], ["self"], False),
        (NoResidual(), [(2, LENGTH, WIDTH)], ["self", "cross"], False),
        (TwoStreams(), [(2, 12, 24), (2, 5, 24)], ["joint"], True),
        (Probe(1), [(2, LENGTH, WIDTH)], ["pooling"], False),
        (Probe(3), [(2, LENGTH, WIDTH)], ["cross"], False),
        (FirstToken(1), [(2, LENGTH, WIDTH)], ["cross"], False),
    ],
    ids="latent context length tables cross-tables region branch reduced no-residual streams probe latents first-token".split(),
)
def test_what_queries_and_keys_are_of(model, shapes, kinds, rope) -> None:
    sites = findings(model, tuple(torch.randn(s) for s in shapes)).sites
    assert [(s.kind, s.rope) for s in sites] == [(k, rope) for k in kinds]


class OneHeadInWindows(nn.Module):
    """Hiera's first stage: tokens in windows, one head, queries that may be pooled."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n // 5, 5, 3, 1, WIDTH).permute(3, 0, 4, 2, 1, 5)
        q = q.view(b, 1, 5, 2, -1, WIDTH).amax(3)
        return nn.functional.scaled_dot_product_attention(q, k, v)


class OneHeadInFrozenWindows(OneHeadInWindows):
    """The weights are inputs of a graph of its own."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = super().forward(x * 2)
        return y * 2


class OneHeadOfPooledImages(nn.Module):
    """MViT's first stage: keys of a smaller image, scores with terms of rows and of columns."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.pool = nn.Conv2d(WIDTH, WIDTH, 2, 2, groups=WIDTH)
        self.same = nn.Conv2d(WIDTH, WIDTH, 3, 1, 1, groups=WIDTH)
        self.rows = nn.Parameter(torch.randn(6, 3, WIDTH))
        self.columns = nn.Parameter(torch.randn(8, 4, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        b = x.shape[0]
        q, k, v = self.qkv(x).view(b, 48, 3, 1, WIDTH).permute(2, 0, 3, 1, 4)
        images = [t.reshape(b, 6, 8, WIDTH).permute(0, 3, 1, 2) for t in (q, k, v)]
        q = self.same(images[0]).view(b, 1, WIDTH, 48).transpose(2, 3)
        k, v = (self.pool(t).view(b, 1, WIDTH, 12).transpose(2, 3) for t in images[1:])
        grid = q.reshape(b, 1, 6, 8, WIDTH)
        rows = torch.einsum("byhwc,hkc->byhwk", grid, self.rows)
        columns = torch.einsum("bythc,hkc->bythk", grid, self.columns)
        s = (q @ k.mT).view(b, 1, 6, 8, 3, 4) + rows[..., None] + columns[..., None, :]
        return s.view(b, 1, 48, 12).softmax(-1) @ v


@pytest.mark.parametrize(
    ("model", "length", "expected"),
    [
        (OneHeadInWindows(), 20, (1, 1, 2, 4)),
        (OneHeadInFrozenWindows(), 20, (1, 1, 2, 4)),
        (OneHeadOfPooledImages(), 48, (1, 1, 48, 12)),
    ],
    ids=["windows", "frozen", "images"],
)
def test_one_head_is_one_head(model, length, expected) -> None:
    (site,) = find_attention(model, (torch.randn(2, length, WIDTH),), dynamic_shapes={}).sites
    assert (site.hq, site.hkv, site.q_len, site.kv_len) == expected
    assert site.kind == "self"
