"""Every sparse pattern there is, as layers of one model, in a file: each skips what it leaves out.

The walk goes over `PATTERNS` itself, so that a new pattern is in it.  The export compares the file
with the program against float64; here the masks come from nothing but the patterns' own cascades,
evaluated point by point, and the scores that each site's loops compute are counted as they run.
"""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx.inliner
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import attn_rewrite as ar
from attn_rewrite import Rule, Where, export_onnx
from attn_rewrite.backends.onnx.artifact import OnnxArtifact
from attn_rewrite.backends.onnx.cached import OPERATOR
from attn_rewrite.passes.sparse import PATTERNS

# Heads of width 8: what ONNX Runtime's own operators take.
WIDTH, HEADS, LENGTH, BATCH = 32, 4, 384, 2
FLAT, VIDEO = "grid=16x24", "grid=6x8x8"


def over(layout: str, *policies: str) -> tuple[str, ...]:
    """Policies with the layout written in for ``@``."""
    return tuple(p.replace("@", f"layout='{layout}'") for p in policies)


# Options of each pattern, by name.  A pattern that is not here is walked with its defaults.
EXAMPLES: Mapping[str, tuple[str, ...]] = {
    "window": ("window(size=16)", "window(size=12, sinks=3)", "window(left=3, right=20)"),
    "streaming": ("streaming(recent=20)", "streaming(recent=9, sinks=0)"),
    "chunked": ("chunked(size=48)",),
    "prefix": ("prefix(size=20)",),
    "neighborhood": over(
        FLAT, "neighborhood(window=[5, 7], @)", "neighborhood(window=5, dilation=[2, 3], @)",
        "neighborhood(window=[5, 5], causal=[true, false], @)", "neighborhood(window=9)",
    ),
    "gna": (*over(FLAT, "gna(window=[6, 8], stride=[2, 4], @)"),
            *over(VIDEO, "gna(window=[3, 4, 4], @)", "gna(window=4, stride=2, @)")),
    "sta": (*over(FLAT, "sta(window=[8, 16], tile=[4, 8], @)"),
            *over(VIDEO, "sta(window=[2, 4, 8], tile=[2, 4, 4], @)")),
    "swin": over(FLAT, "swin(window=[4, 8], @)", "swin(window=8, shift=4, @)"),
    "clear": over(FLAT, "clear(radius=4, @)"),
    "radial": over(VIDEO, "radial(rule='paper', @)"),
    "tile": over(VIDEO, "tile(references=1, @)"),
    "s2": ("s2(block=16, local=1, vertical=8, dense_heads=1)",
           "s2(block=32, local=1, vertical=6, mode='relative')"),
    "longlora": ("longlora(size=64)", "longlora(size=64, sinks=4)"),
    "longformer": ("longformer(window=16, global_tokens=2)",),
    "bigbird": ("bigbird(block=16, window=3, global_blocks=1, random=1)",),
    "blocks": (),  # what paro writes
    "paro": over(VIDEO, "paro(density=0.3, block=32, @)",
                 "paro(recall=0.2, block=32, @)"),
    "combiner": ("combiner(segment=24)", "combiner(kind='logsparse')",
                 *over(FLAT, "combiner(kind='axial', @)")),
    "union": over(FLAT, "union(of=[window(size=16), swin(window=4, @)])"),
    "intersection": over(FLAT, "intersection(of=[window(size=64), swin(window=8, @)])"),
}  # fmt: skip
CAUSAL = ("streaming", "s2", "logsparse")
PIPELINES = (
    *over(FLAT, "reorder(order='wh', @) | window(size=32)",
          "reorder(tile=[4, 8], @) | chunked(size=32)"),
    *over(VIDEO, "reorder(order='whf', @) | neighborhood(window=3, @)"),
    "window(size=16) | clipped_softmax", "chunked(size=48) | clipped_softmax(zeta=1.1)",
    "window(size=16) | softcap(cap=5)", "window(size=16) | alibi", "window(size=16) | gated",
    "window(size=16) | kv_int8", "chunked(size=48) | kv_int4", "chunked(size=48) | kv_int2",
    *over(FLAT, "clear(radius=4, @) | int8(pv=true)"), "longlora(size=64) | int8",
)  # fmt: skip
# Patterns where only some heads have them, with tokens before, behind or beside the grid, in a
# causal model, where ONNX Runtime's own operators compete, and at lengths that are not known.
VARIANTS: Mapping[str, tuple[str, ...]] = {
    "heads": (
        "window(size=16)", "chunked(size=48)",
        *over(FLAT, "neighborhood(window=[5, 7], @)", "swin(window=[4, 8], @)"),
    ),
    # Text beside a grid as small as this leaves most patterns no whole block to skip.
    "text": over("grid=15x24,text=16,suffix=8", "swin(window=[5, 8], @)"),
    "padding": over("grid=15x24,padding=24", "neighborhood(window=[5, 7], @)",
                    "gna(window=[5, 8], stride=[1, 4], @)", "swin(window=[5, 8], @)"),
    "causal": ("window(size=16)", "window(size=300)", "window(size=12, sinks=3)",
               "streaming(recent=20)", "chunked(size=48)", "longlora(size=64)"),
    "length": ("window(size=16)", "window(size=12, sinks=3)", "window(left=3, right=20)",
               "streaming(recent=20)"),
}  # fmt: skip
# Its bands leave out whole blocks only where frames are many and long; then see below.
FULL = ("radial",)


def names() -> list[str]:
    """Every pattern by the name that policies use."""
    found = []
    for entry in PATTERNS:
        module, _, kind = entry.partition(":")
        home = importlib.import_module(f"attn_rewrite.passes.sparse.{module}")
        found.append(getattr(home, kind).name)
    return found


def policies(first: bool = False) -> list[str]:
    """A policy for every pattern, or all there are."""
    chosen = [EXAMPLES.get(n, (n,)) for n in names()]
    return [p for some in chosen for p in (some[:1] if first else some)]


class Attention(nn.Module):
    """Over tokens of any number, with heads that may share keys."""

    def __init__(self, causal: bool, key_heads: int) -> None:
        super().__init__()
        self.causal, self.key_heads = causal, key_heads
        self.q = nn.Linear(WIDTH, WIDTH)
        self.kv = nn.Linear(WIDTH, 2 * key_heads * WIDTH // HEADS)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        k, v = self.kv(x).unflatten(-1, (2, self.key_heads, -1)).permute(2, 0, 3, 1, 4)
        out = nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=self.causal, enable_gqa=self.key_heads != HEADS
        )
        return out.transpose(1, 2).flatten(2)


class WithLse(Attention):
    """The same with FlexAttention, which gives the log-sum-exp of every row too."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        q = self.q(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        k, v = self.kv(x).unflatten(-1, (2, self.key_heads, -1)).permute(2, 0, 3, 1, 4)
        n = x.shape[1]
        mask = create_block_mask(_causal, None, None, n, n, device="cpu") if self.causal else None
        out, lse = flex_attention(
            q, k, v, block_mask=mask, enable_gqa=self.key_heads != HEADS, return_lse=True
        )
        return out.transpose(1, 2).flatten(2), lse


def _causal(_b: Tensor, _h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
    return q >= kv


class Layers(nn.Module):
    """One attention for each of ``count`` policies, side by side."""

    def __init__(self, causal: list[bool], key_heads: int, kind: type[Attention]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(kind(c, key_heads) for c in causal)

    def forward(self, x: Tensor) -> tuple[Any, ...]:
        return tuple(layer(x) for layer in self.layers)


@dataclass(frozen=True)
class Walk:
    """A model of ``policies``, one layer each, rewritten by them and exported."""

    policies: list[str]
    done: Any
    artifact: OnnxArtifact
    x: Tensor

    def site(self, number: int) -> Any:
        """How the attention of one layer left."""
        return next(s for s in self.artifact.sites if s.name.startswith(f"layers.{number}#"))


def walk(
    given: list[str],
    place: Path,
    *,
    target: str = "portable",
    key_heads: int = HEADS,
    length: int = LENGTH,
    causal: bool = False,
    heads: tuple[int, ...] | None = None,
    opset: int | None = None,
    kind: type[Attention] = Attention,
    fixed: bool = True,
) -> Walk:
    torch.manual_seed(0)
    ahead = [causal or any(c in p for c in CAUSAL) for p in given]
    model = Layers(ahead, key_heads, kind).eval().requires_grad_(False)
    x = torch.randn(BATCH, length, WIDTH)
    rules = [
        Rule(where=Where(layer=f"layers.{i}", **({"heads": heads} if heads else {})), apply=p)
        for i, p in enumerate(given)
    ]
    measured = [{"x": x}] if any("paro" in p for p in given) else None
    done = ar.optimize(model, ar.Policy(rules), (x,), dynamic_shapes={} if fixed else None,
                       calibration=measured)  # fmt: skip
    refused = [s.refusals[0].reason for s in done.report.sites if s.refusals]
    assert not refused
    artifact = export_onnx(done, place / "m.onnx", target=target, opset=opset)
    assert artifact.errors, "the export compares with the program"
    return Walk(given, done, artifact, x)


def scores(artifact: OnnxArtifact, x: Tensor) -> dict[str, int]:
    """Scores that the loops of each site compute, by the prefix of its names, counted in a run."""
    proto = onnx.inliner.inline_local_functions(onnx.load(artifact.path))
    counted: dict[str, str] = {}
    for i, scan in enumerate(n for n in proto.graph.node if n.op_type == "Scan"):
        body = next(a.g for a in scan.attribute if a.name == "body")
        product = next(n for n in body.node if n.op_type in ("MatMul", "MatMulInteger"))
        body.node.append(onnx.helper.make_node("Size", [product.output[0]], [f"scores_{i}"]))
        body.output.append(onnx.helper.make_tensor_value_info(f"scores_{i}", 7, []))
        next(a for a in scan.attribute if a.name == "scan_output_axes").ints.append(0)
        scan.output.append(f"all_scores_{i}")
        proto.graph.output.append(
            onnx.helper.make_tensor_value_info(f"all_scores_{i}", 7, ["steps"])
        )
        found = re.search(r"attention_\d+(?=/)", scan.output[0])
        assert found is not None, scan.output[0]
        counted[f"all_scores_{i}"] = found.group()
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(proto.SerializeToString(), options)
    total: dict[str, int] = {}
    for name, value in zip(counted, session.run(list(counted), {"x": x.numpy()}), strict=True):
        total[counted[name]] = total.get(counted[name], 0) + int(value.sum())
    return total


def check(found: Walk) -> None:
    """Every site skips, and its loops compute as many scores as it says, fewer than all."""
    length = found.x.shape[1]
    every = BATCH * HEADS * length * length
    ran = scores(found.artifact, found.x)
    functions = [f.doc_string for f in onnx.load(found.artifact.path).functions]
    for number, policy in enumerate(found.policies):
        site = found.site(number)
        if policy.startswith(FULL):
            assert (site.form, site.skips) == ("dense mask", False)
            continue
        assert site.skips, (policy, site)
        assert (site.form == "einsums") == policy.startswith("combiner"), (policy, site)
        if site.form in ("einsums", OPERATOR):
            continue  # no loops: the second is a contrib operator, for its own target only
        computed = ran[f"attention_{found.artifact.sites.index(site)}"]
        assert 0 < computed < every, (policy, site)
        if site.tiles is not None:
            assert computed == BATCH * site.tiles[0] * site.rows**2, (policy, site)
    assert len(functions) == sum(not p.startswith(FULL) for p in found.policies)
    assert all("\nranks " in text for text in functions)


@pytest.fixture(scope="module", autouse=True)
def translations_read_once() -> Iterator[None]:
    """torch reads its 500 translations anew at every export, a third of the time of a small one."""
    import onnxscript._framework_apis.torch_2_5 as apis

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(apis, "get_torchlib_ops", functools.cache(apis.get_torchlib_ops))
        yield


def test_every_pattern_is_walked() -> None:
    assert set(EXAMPLES) <= set(names()), "an example is of no pattern"
    walked = {re.match(r"\w+", p).group() for p in policies(first=True)}  # type: ignore[union-attr]
    assert walked == set(names()) - {"blocks"}


# One target among the slow tests, the other among those of `make matrix`.
TARGETS = [
    pytest.param("portable", marks=pytest.mark.slow),
    pytest.param("onnxruntime", marks=pytest.mark.matrix),
]


@pytest.mark.parametrize(
    ("target", "key_heads"),
    [
        pytest.param("portable", 2, marks=pytest.mark.slow),
        pytest.param("onnxruntime", HEADS, marks=pytest.mark.matrix),
    ],
)
def test_a_layer_for_every_pattern(target: str, key_heads: int, tmp_path: Path) -> None:
    check(walk(policies(first=True), tmp_path, target=target, key_heads=key_heads))


@pytest.mark.parametrize("target", TARGETS)
def test_log_sum_exps_of_every_pattern(target: str, tmp_path: Path) -> None:
    """A combiner has none; what leaves out no block is not walked."""
    given = [p for p in policies(first=True) if not p.startswith(("combiner", *FULL))]
    found = walk(given, tmp_path, target=target, key_heads=2, kind=WithLse)
    check(found)
    for site in found.done.report.sites:
        assert site.lse.implementation.max_abs <= site.lse.bound


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(variant: str, target: str, tmp_path: Path) -> None:
    found = walk(
        list(VARIANTS[variant]), tmp_path, target=target, key_heads=2 if variant != "heads" else 4,
        heads=(1, 2) if variant == "heads" else None, causal=variant == "causal",
        fixed=variant != "length",
    )  # fmt: skip
    check(found)
    sites = [found.site(i) for i, _ in enumerate(found.policies)]
    assert all(bool(s.choice) == (target == "onnxruntime") for s in sites)
    own = {p: s.choice for p, s in zip(found.policies, sites, strict=True)}
    if (variant, target) == ("causal", "onnxruntime"):  # one of both competes, and is priced
        for policy in ("window(size=16)", "window(size=300)", "streaming(recent=20)"):
            assert ("estimated" in own[policy]) == policy.startswith("window"), own[policy]
    if variant == "length":
        for length in (131, 500):
            x = torch.randn(BATCH + 1, length, WIDTH)
            results = [t.detach().numpy() for t in found.done(x)]
            names = [o.name for o in found.artifact.outputs]
            found.artifact.verify({"x": x.numpy()}, dict(zip(names, results, strict=True)))


@pytest.mark.slow
def test_radial_at_a_length_that_it_is_for(tmp_path: Path) -> None:
    (policy,) = over("grid=16x8x16", "radial(@)")
    found = walk([policy], tmp_path, length=2048)
    site = found.site(0)
    assert (site.form, site.skips) == ("blocks", True)
    computed = scores(found.artifact, found.x)["attention_0"]
    assert computed == BATCH * site.tiles[0] * site.rows**2 < BATCH * HEADS * 2048**2


@pytest.mark.matrix
def test_a_layer_for_every_option(tmp_path: Path) -> None:
    check(walk(policies(), tmp_path, target="portable", key_heads=HEADS))


@pytest.mark.parametrize("target", TARGETS)
def test_pipelines(target: str, tmp_path: Path) -> None:
    heads = HEADS if target == "portable" else 2
    check(walk(list(PIPELINES), tmp_path, target=target, key_heads=heads))


class Apart(nn.Module):
    """Attention over queries, keys and values from outside."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(q, k, v)


@pytest.mark.parametrize("kind", [torch.export.Dim.AUTO, torch.export.Dim.DYNAMIC])
def test_queries_and_keys_with_lengths_of_their_own(kind: Any, tmp_path: Path) -> None:
    """Are two sequences unless they share a length, or the rule says that they are aligned."""
    q, k, v = (torch.randn(1, 2, 90, 8) for _ in range(3))
    free = {n: {2: kind} for n in "qkv"}
    done = ar.optimize(Apart(), "window(size=16)", (q, k, v), dynamic_shapes=free)
    (refusal,) = done.report.sites[0].refusals
    assert refusal.code == "window-cross"
    assert "lengths of their own" in refusal.reason
    assert "one Dim in dynamic_shapes" in refusal.reason
    length = torch.export.Dim("length", max=512)
    shared = {n: {2: length} for n in "qkv"}
    aligned = ar.Policy([Rule(where=Where(kind=("cross",)), apply="window(size=16)")])
    for policy, shapes in (("window(size=16)", shared), (aligned, free)):
        done = ar.optimize(Apart(), policy, (q, k, v), dynamic_shapes=shapes)
        (site,) = export_onnx(done, tmp_path / "m.onnx").sites
        assert (site.form, site.skips) == ("tiles", True)


class Cosine(torch.nn.Module):
    """Cosines by a learned factor of each head, as in Swin V2: no fused kernel takes the score."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = torch.nn.Linear(16, 48)
        self.factor = torch.nn.Parameter(torch.linspace(1, 4, 4).view(4, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, s, _ = x.shape
        q, k, v = (t.view(b, s, 4, 4).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        normal = torch.nn.functional.normalize
        scores = normal(q, dim=-1) @ normal(k, dim=-1).mT * self.factor
        return (scores.softmax(-1) @ v).transpose(1, 2).reshape(b, s, 16)


def test_a_window_of_fewer_tokens_than_a_block_leaves_and_is_called_dense(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 49, 16)
    done = ar.optimize(Cosine().eval(), "window(size=16)", (x,), dynamic_shapes=({},))
    (site,) = export_onnx(done, tmp_path / "m.onnx").sites
    assert (site.form, site.skips) == ("dense mask", False)
    assert "leaves out no whole blocks" in site.detail
    assert "mapped" not in site.detail
    exact = ar.optimize(Cosine().eval(), "exact", (x,), dynamic_shapes=({},))
    (site,) = export_onnx(exact, tmp_path / "exact.onnx").sites
    assert (site.form, site.detail) == ("dense", "MatMul and Softmax, no mask")
