"""The torch.compile front end: the same numbers in inference, training, generation and autocast."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import attn_rewrite as ar
from attn_rewrite import knobs
from attn_rewrite.compile_backend import Session, attn_rewrite, compiled, read_options
from attn_rewrite.errors import PolicyError
from tests.test_optimize import Block, reference

transformers = pytest.importorskip("transformers")


class Attention(nn.Module):
    """Four heads of width 8 over [batch, length, 32], with dropout in training."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.qkv, self.out, self.dropout = nn.Linear(32, 96), nn.Linear(32, 32), dropout

    def split(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [t.unflatten(-1, (4, 8)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        p = self.dropout if self.training else 0.0
        attended = nn.functional.scaled_dot_product_attention(*self.split(x), dropout_p=p)
        return self.out(attended.transpose(1, 2).flatten(2))


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)


def eager(model: torch.nn.Module, policy: str = "exact") -> tuple[torch.nn.Module, Session]:
    session = Session()
    options = {"policy": policy, "compiler": "eager", "session": session}
    return torch.compile(model, backend=attn_rewrite, options=options), session


def test_registered_by_entry_point() -> None:
    block = Block().eval()
    module = torch.compile(
        block, backend="attn_rewrite", options={"policy": "exact", "compiler": "eager"}
    )
    x = torch.randn(2, 11, 32)
    with torch.no_grad():
        assert torch.allclose(module(x)["hidden"], block(x)["hidden"], atol=1e-5)


def test_sites_have_the_names_of_the_ahead_of_time_path() -> None:
    block = torch.nn.Sequential(Block().eval())

    class Wrapper(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = block

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layers[0](x)["hidden"]

    model = Wrapper().eval()
    x = torch.randn(2, 11, 32)
    module, session = eager(model)
    module(x)
    ahead = ar.find_attention(model, (x,))
    assert [s.name for s in session.sites] == [s.name for s in ahead.sites]


# torch hands the compiler the path of its libraries unquoted.
INDUCTOR = pytest.param(
    "inductor", marks=pytest.mark.skipif(" " in torch.__file__, reason="a space in torch's path")
)


@pytest.mark.parametrize("compiler", ["aot_eager", INDUCTOR])
def test_gradients(compiler: str) -> None:
    block = Block().train()
    x = torch.randn(2, 13, 32)
    module = compiled(block, ar.Policy.parse("exact"), compiler)
    loss = module(x)["hidden"].square().mean()
    loss.backward()
    found = {n: p.grad.clone() for n, p in block.named_parameters() if p.grad is not None}
    assert [g.kernels for g in module.session.graphs] == [{"attention#0": "sdpa"}]
    block.zero_grad()
    block(x)["hidden"].square().mean().backward()
    wanted = {n: p.grad for n, p in block.named_parameters() if p.grad is not None}
    assert found.keys() == wanted.keys()
    for name, grad in wanted.items():
        assert (found[name] - grad).abs().max() <= 1e-5 * max(1.0, grad.abs().max()), name


def test_window_at_changing_lengths() -> None:
    block = Block().eval()
    module, session = eager(block, "window(size=6)")
    for length in (50, 31, 64, 7):
        x = torch.randn(2, length, 32)
        with torch.no_grad():
            error = (module(x)["hidden"].double() - reference(block, x, left=6)).abs().max()
        assert error < 1e-5
    assert len(session.graphs) <= 2  # one static, one dynamic


def test_mode_follows_the_source() -> None:
    block = Block().eval()
    module = compiled(block, ar.Policy.parse("exact"), compiler="eager")
    assert not module.training
    module.train()
    assert block.training
    assert set(module.state_dict()) == set(block.state_dict())
    module.double()
    assert module(torch.randn(1, 5, 32, dtype=torch.float64))["hidden"].dtype == torch.float64


def small(kind: str, implementation: str) -> torch.nn.Module:
    common = {
        "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 64,
        "vocab_size": 100, "attn_implementation": implementation, "num_key_value_heads": 2,
        "head_dim": 16, "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0,
    }  # fmt: skip
    if kind == "gemma3":
        layers = ["sliding_attention", "full_attention"]
        config = transformers.Gemma3TextConfig(**common, sliding_window=8, layer_types=layers)
        return transformers.Gemma3ForCausalLM(config).eval()
    if kind == "t5":
        config = transformers.T5Config(
            d_model=64,
            d_kv=16,
            d_ff=64,
            num_layers=2,
            num_heads=4,
            vocab_size=100,
            decoder_start_token_id=0,
            pad_token_id=0,
            eos_token_id=1,
        )
        return transformers.T5ForConditionalGeneration(config).eval()
    if kind == "gpt2":
        config = transformers.GPT2Config(
            n_embd=64,
            n_head=4,
            n_layer=2,
            vocab_size=100,
            attn_implementation=implementation,
            bos_token_id=1,
            eos_token_id=2,
        )
        return transformers.GPT2LMHeadModel(config).eval()
    if kind == "deepseek":  # latents are cached, and keys are projected from them
        latent = {"kv_lora_rank": 16, "q_lora_rank": 12, "qk_rope_head_dim": 4}
        widths = {"qk_nope_head_dim": 8, "v_head_dim": 8, "first_k_dense_replace": 2}
        whole = common | latent | widths | {"num_key_value_heads": 4, "head_dim": 4}
        return transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**whole)).eval()
    if kind == "qwen3":
        return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**common)).eval()
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**common)).eval()


def generation(cache: str, tokens: int) -> dict[str, object]:
    """Greedy decoding of exactly ``tokens`` new tokens, with a dynamic or a static cache."""
    options: dict[str, object] = {
        "max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0,
    }  # fmt: skip
    if cache == "static":
        options |= {"cache_implementation": "static", "disable_compile": True}
    return options


SLOW = pytest.mark.slow
GENERATED = [
    *[pytest.param("llama", "sdpa", c, 24) for c in ("dynamic", "static")],
    pytest.param("gpt2", "eager", "dynamic", 24),
    *[pytest.param(k, i, c, 64, marks=SLOW) for k in ("llama", "gpt2", "qwen3", "gemma3")
      for i in ("eager", "sdpa") for c in ("dynamic", "static")],
    *[pytest.param("t5", "sdpa", c, 64, marks=SLOW) for c in ("dynamic", "static")],
]  # fmt: skip


@pytest.mark.parametrize(("kind", "implementation", "cache", "tokens"), GENERATED)
def test_generate(kind: str, implementation: str, cache: str, tokens: int) -> None:
    """Greedy tokens are equal, and every site ran rewritten in prefill and in decode."""
    model = small(kind, implementation)
    ids = torch.randint(3, 100, (2, 9))
    options = generation(cache, tokens)
    wanted = model.generate(ids, **options)
    module = compiled(model, ar.Policy.parse("exact"), compiler="eager")
    assert torch.equal(module.generate(ids, **options), wanted)
    graphs = module.session.graphs
    assert len(graphs) >= 2
    per_graph = 4 if kind == "t5" else 2  # self and cross in each of two decoder blocks
    for graph in graphs:
        assert len(graph.sites) == per_graph
        assert set(graph.kernels) == {s.name for s in graph.sites}
    assert len({s.name for g in graphs for s in g.sites}) == per_graph
    lengths = {str(g.sites[0].q_len) for g in graphs}
    assert "1" in lengths
    assert len(lengths) > 1 or kind == "t5"  # its decoder starts from one token


def windowed(model: torch.nn.Module, ids: torch.Tensor, size: int, tokens: int) -> torch.Tensor:
    """Logits [tokens, batch, vocabulary] without a cache: every step sees the whole sequence through
    a window written by hand as a mask."""
    found, step = [], ids
    for _ in range(tokens):
        n = torch.arange(step.shape[1])
        distance = n[:, None] - n
        keep = ((distance >= 0) & (distance < size)).expand(len(ids), 1, -1, -1)
        mask = torch.zeros(keep.shape).masked_fill(~keep, torch.finfo(torch.float32).min)
        with torch.no_grad():
            logits = model(step, attention_mask=mask, use_cache=False).logits[:, -1]
        found.append(logits)
        step = torch.cat([step, logits.argmax(-1, keepdim=True)], 1)
    return torch.stack(found)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("kind", ["llama", pytest.param("deepseek", marks=pytest.mark.slow)])
def test_windows_in_decode(kind: str, cache: str) -> None:
    """In a cache of fixed size the position is data: a window of 4 sees the last four tokens."""
    model, ids = small(kind, "sdpa"), torch.randint(3, 100, (2, 9))
    module = compiled(model, ar.Policy.parse("window(size=4)"), compiler="eager")
    options = generation(cache, 7) | {"return_dict_in_generate": True, "output_logits": True}
    result = module.generate(ids, **options)
    wanted = windowed(model, ids, 4, 7)
    assert (torch.stack(result.logits) - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    decode = [s for g in module.session.graphs for s in g.sites if str(s.q_len) == "1"]
    assert decode
    assert all(s.causal for s in decode)
    assert {s.offset for s in decode} == {"#kv - 1" if cache == "dynamic" else "POS[] % #kv - q"}


@pytest.mark.slow
def test_windows_in_a_rolling_cache() -> None:
    """The sliding layer of Gemma 3 rolls its static cache; static and dynamic logits agree."""
    ids, logits = torch.randint(3, 100, (2, 9)), []
    model = small("gemma3", "sdpa")
    for cache in ("dynamic", "static"):
        torch._dynamo.reset()
        policy = ar.Policy.parse("window(size=3, causal=true)")
        options = generation(cache, 6) | {"return_dict_in_generate": True, "output_logits": True}
        module = compiled(model, policy, compiler="eager")
        logits.append(torch.stack(module.generate(ids, **options).logits))
    assert (logits[0] - logits[1]).abs().max() <= 1e-5 * logits[0].abs().max()


def test_windows_without_a_known_position_are_refused() -> None:
    """Three queries and nine keys of one source, and nothing says where the queries stand."""

    class Summary(Attention):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = self.split(x)
            return nn.functional.scaled_dot_product_attention(q[:, :, ::3], k, v)

    model, x = Summary().eval(), torch.randn(2, 9, 32)
    module, session = eager(model, "window(size=2)")
    with torch.no_grad():
        assert torch.equal(module(x), model(x))
    (graph,) = session.graphs
    assert graph.kernels == {}
    assert [r.code for r in graph.refusals] == ["window-position"]
    assert "3 queries for 9 keys" in graph.refusals[0].reason


def test_decode_knows_its_position() -> None:
    """With a cache the one query is the newest: a window of 3 keeps the last three keys."""
    model = small("llama", "sdpa")
    module = compiled(model, ar.Policy.parse("window(size=3)"), compiler="eager")
    module.generate(
        torch.randint(3, 100, (1, 9)), max_new_tokens=4, do_sample=False, pad_token_id=0
    )
    decode = [g for g in module.session.graphs if str(g.sites[0].q_len) == "1"]
    assert decode
    for graph in decode:
        assert all(s.offset == "#kv - 1" and s.causal for s in graph.sites)


@pytest.mark.parametrize(
    "options",
    [
        {"policcy": "exact"},
        {"compiler": "gcc"},
        {"policy": "windoww(3)"},
        {
            "policy": ar.Policy.parse("exact").__class__(
                ar.Policy.parse("exact").rules, "cosine>=0.9"
            )
        },
    ],
)
def test_bad_options(options: dict) -> None:
    with pytest.raises(PolicyError):
        read_options(options)


def test_autocast() -> None:
    block = Block().eval()
    module, session = eager(block)
    x = torch.randn(2, 11, 32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        result, wanted = module(x)["hidden"], block(x)["hidden"]
    assert session.graphs[0].kernels
    exact = reference(block, x)
    own = (wanted.double() - exact).abs().max()
    assert (result.double() - exact).abs().max() <= max(2 * own, 4 * 2**-8 * exact.abs().max())


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_dropout_has_the_stream_of_the_original(compiler: str) -> None:
    """A rewritten attention draws its dropout where the original does, from the same generator."""
    model, x, session = Attention(dropout=0.5).train(), torch.randn(2, 11, 32), Session()
    options = {"compiler": compiler, "session": session}
    module = torch.compile(model, backend=attn_rewrite, options=options)
    drawn = []
    for run in (module, model, module):
        torch.manual_seed(3)
        drawn.append(run(x))
    assert session.graphs[0].kernels == {"attention#0": "sdpa"}
    assert torch.allclose(drawn[0], drawn[1], atol=1e-6)
    assert torch.equal(drawn[0], drawn[2])
    assert not torch.allclose(module(x), drawn[0], atol=1e-3)
    model.eval()
    assert torch.allclose(module(x), model(x), atol=1e-6)


def test_stages_of_every_graph_are_dumped(tmp_path: Path) -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Attention(), Attention()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.first(x)
            torch._dynamo.graph_break()
            return self.second(x)

    model, x = Broken().eval(), torch.randn(2, 11, 32)
    module, session = eager(model, "window(size=3)")
    with knobs.override(dump=tmp_path), torch.no_grad():
        module(x)
    assert [[s.name for s in g.sites] for g in session.graphs] == [["first#0"], ["second#0"]]
    assert [s.name for s in session.sites] == ["first#0", "second#0"]
    folders = sorted(p.name for p in tmp_path.iterdir())
    assert folders == ["graph-00", "graph-01"]
    stages = [p.name.partition("-")[2] for p in sorted((tmp_path / "graph-01").iterdir())]
    assert stages == [
        "capture.fx", "found-second-0.cascade", "plan.json", "rewritten-second-0.cascade",
        "kernel-second-0.py", "spliced.fx",
    ]  # fmt: skip


class Checkpointed(nn.Module):
    """Two layers whose activations are computed again in the backward pass."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Attention(dropout) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
        return x


def gradients(model: nn.Module, run: nn.Module, *args: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    out = run(*args)
    (out if isinstance(out, torch.Tensor) else out.logits).square().mean().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("compiler", ["eager", "aot_eager", INDUCTOR])
def test_checkpointed_attention(compiler: str) -> None:
    """The graph that is computed again is rewritten like any other; gradients are the original's."""
    model, x = Checkpointed().train(), torch.randn(2, 13, 32)
    module = compiled(model, ar.Policy.parse("exact"), compiler)
    found, wanted = gradients(model, module, x), gradients(model, model, x)
    (graph,) = module.session.graphs
    assert graph.kernels == {"layers.0#0": "sdpa", "layers.1#0": "sdpa"}
    assert graph.refusals == ()
    assert found.keys() == wanted.keys()
    for name, grad in wanted.items():
        assert (found[name] - grad).abs().max() <= 1e-5 * max(1.0, grad.abs().max()), name


def test_checkpointed_windows() -> None:
    model, x = Checkpointed().train(), torch.randn(2, 13, 32)
    module, session = eager(model, "window(size=4)")
    keep = (distance := torch.arange(13)[:, None] - torch.arange(13)) <= 2
    keep &= -distance <= 1

    class Reference(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in model.layers:
                attended = nn.functional.scaled_dot_product_attention(
                    *layer.split(x), attn_mask=keep
                )
                x = x + layer.out(attended.transpose(1, 2).flatten(2))
            return x

    found, wanted = gradients(model, module, x), gradients(model, Reference(), x)
    assert all(session.graphs[0].kernels.values())
    for name, grad in wanted.items():
        assert (found[name] - grad).abs().max() <= 1e-5 * max(1.0, grad.abs().max()), name


def test_what_a_checkpoint_recomputes_stays() -> None:
    """A selective checkpoint keeps its choice, and Dynamo's graph is left as it was."""
    from functools import partial

    from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

    chosen = partial(create_selective_checkpoint_contexts, [torch.ops.aten.mm.default])

    class Selective(Attention):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            plain = checkpoint(super().forward, x, use_reentrant=False)
            return plain + checkpoint(super().forward, x, use_reentrant=False, context_fn=chosen)

    seen: list[object] = []

    def backend(gm: torch.fx.GraphModule, inputs: list[torch.Tensor]):
        run = attn_rewrite(gm, inputs, options={"compiler": "eager"})
        for graph in (gm, run.__self__):
            seen.append([m.meta.get("_checkpoint_context_fn") for m in graph.children()])
        return run

    model, x = Selective().train(), torch.randn(2, 5, 32)
    module = torch.compile(model, backend=backend)
    found, wanted = gradients(model, module, x), gradients(model, model, x)
    assert all(torch.allclose(found[n], wanted[n], atol=1e-6) for n in wanted)
    assert [[m is not None for m in metas] for metas in seen] == [[False, True]] * 2


def test_gradient_checkpointing_of_a_library() -> None:
    model = small("llama", "sdpa").train()
    model.gradient_checkpointing_enable()
    ids = torch.randint(3, 100, (2, 9))
    module = compiled(model, ar.Policy.parse("exact"), "aot_eager")
    found, wanted = gradients(model, module, ids), gradients(model, model, ids)
    sites = {s.name for s in module.sites}
    assert sites == {f"model.layers.{i}.self_attn#0" for i in range(2)}
    assert {n for g in module.session.graphs for n in g.kernels} == sites
    for name, grad in wanted.items():
        assert (found[name] - grad).abs().max() <= 1e-5 * max(1.0, grad.abs().max()), name


# A graph break in a loop over layers: one graph serves them all


class Broken(nn.Module):
    """Three layers, with a graph break in each at another place."""

    def __init__(self, place: str) -> None:
        super().__init__()

        class Layer(Attention):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                parts = self.split(x)
                if place == "inside":
                    torch._dynamo.graph_break()
                attended = nn.functional.scaled_dot_product_attention(*parts)
                if place == "around":
                    torch._dynamo.graph_break()
                return x + self.out(attended.transpose(1, 2).flatten(2))

        self.place = place
        self.layers = nn.ModuleList(Layer() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
            if self.place == "between":
                torch._dynamo.graph_break()
        return x

    def windowed(self, x: torch.Tensor, sizes: list[int]) -> torch.Tensor:
        distance = torch.arange(x.shape[1])[:, None] - torch.arange(x.shape[1])
        for layer, size in zip(self.layers, sizes, strict=True):
            keep = (distance <= size // 2) & (-distance <= size - 1 - size // 2)
            attended = nn.functional.scaled_dot_product_attention(*layer.split(x), attn_mask=keep)
            x = x + layer.out(attended.transpose(1, 2).flatten(2))
        return x


SCHEDULE = ar.Policy(
    rules=[
        ar.Rule(where=ar.Where(layer="layers.0"), apply="window(size=2)"),
        ar.Rule(where=ar.Where(layer="layers.2*"), apply="window(size=5)"),
    ]
)


@pytest.mark.parametrize("compiler", ["eager", "aot_eager", INDUCTOR])
@pytest.mark.parametrize("place", ["between", "inside", "around"])
def test_layers_that_share_a_graph(place: str, compiler: str) -> None:
    """Each layer has the name that it has ahead of time, and its own rule."""
    if (place, compiler) not in (("between", "inductor"), ("inside", "aot_eager")):
        compiler = "eager"
    model, x, session = Broken(place).eval(), torch.randn(2, 9, 32), Session()
    options = {"policy": SCHEDULE, "compiler": compiler, "session": session}
    module = torch.compile(model, backend=attn_rewrite, options=options)
    wanted = model.windowed(x, [2, 40, 5])
    for _ in range(2):
        with torch.no_grad():
            assert (module(x) - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    names = [f"layers.{i}#0" for i in range(3)]
    assert [[s.name for s in g.sites] for g in session.graphs if g.sites] == [[n] for n in names]
    assert {n for g in session.graphs for n in g.kernels} == {names[0], names[2]}
    assert not session.refusals


def test_layers_that_share_a_graph_have_the_names_of_the_ahead_of_time_path() -> None:
    model, x = Broken("none").eval(), torch.randn(2, 9, 32)
    ahead = [s.name for s in ar.find_attention(model, (x,)).sites]
    for place in ("between", "inside", "around"):
        torch._dynamo.reset()
        module = ar.optimize(Broken(place).eval(), "exact")
        module(x)
        assert [s.name for s in module.sites] == ahead


def test_a_replaced_layer_is_the_layer_of_its_place() -> None:
    """What a parameter is, is asked anew where another stands in its place."""
    model, x = Broken("between").eval(), torch.randn(2, 9, 32)
    module, session = eager(model)
    with torch.no_grad():
        module(x)
        model.layers[1] = Broken("between").layers[0].eval()
        del model.layers[0]
        assert torch.allclose(module(x), model(x), atol=1e-6)
    assert {s.name for s in session.sites} <= {f"layers.{i}#0" for i in range(3)}


def test_a_layer_that_cannot_be_told_is_refused_with_a_warning() -> None:
    """Parameters that belong to no module of the model: no rule for a layer is applied."""
    model, x = Broken("between").eval(), torch.randn(2, 9, 32)
    session = Session()
    options = {"policy": SCHEDULE, "compiler": "eager", "session": session}
    other = {n: p.detach().clone() for n, p in model.named_parameters()}

    class Outer(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return run(x)

    def run(x: torch.Tensor) -> torch.Tensor:
        return model(x)

    with torch.no_grad():
        wanted = torch.func.functional_call(model, other, (x,))
        module = torch.compile(Outer(), backend=attn_rewrite, options=options)
        with pytest.warns(UserWarning, match="layer that this graph runs for"):
            found = module(x)
    assert torch.allclose(found, wanted, atol=1e-6)
    assert {r.code for r in session.refusals} == {"unknown-layer"}
    assert all(r.site and r.source and r.node for r in session.refusals)


def test_two_attentions_of_a_module_in_two_graphs_have_two_names() -> None:
    """Numbers go on over graph breaks, and a graph for another length has those it had."""

    class Twice(Attention):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = super().forward(x)
            torch._dynamo.graph_break()
            return super().forward(x)

    module, session = eager(Twice().eval())
    with torch.no_grad():
        for length in (5, 9, 7):
            module(torch.randn(2, length, 32))
    names = [[s.name for s in g.sites] for g in session.graphs]
    assert names[:2] == [["attention#0"], ["attention#1"]]
    assert names[2:] in ([], names[:2])


def test_diffusers_transformer_in_a_loop() -> None:
    """A denoising loop calls one graph at every step: sites stay, results are the original's."""
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=2, sample_size=8,
        num_embeds_ada_norm=10, norm_num_groups=4,
    ).eval()  # fmt: skip
    module, session = eager(model)
    noise = torch.randn(2, 4, 8, 8)
    ends = []
    with torch.no_grad():
        for run in (module, model):
            x = noise
            for step in (30, 20, 10):
                time, labels = torch.full((2,), step), torch.tensor([1, 2])
                x = x - 0.1 * run(x, timestep=time, class_labels=labels).sample
            ends.append(x)
    assert torch.allclose(ends[0], ends[1], atol=1e-5)
    (graph,) = session.graphs
    assert len(graph.sites) == 2
    assert set(graph.kernels) == {s.name for s in graph.sites}


def test_report_and_plan_fill_as_graphs_are_compiled() -> None:
    class Net(torch.nn.Module):
        def forward(self, q, k, v):
            return ((q @ k.mT * 0.5).softmax(-1)) @ v

    assert ar.optimize(Net(), "window(size=4)").report.sites == ()
    model = compiled(Net(), ar.Policy.parse("window(size=4)"), "eager")
    q = torch.randn(1, 2, 16, 4)
    model(q, q, q)
    (site,) = model.report.sites
    assert site.status == "unbudgeted"
    assert site.steps == ("window(size=4)",)
    assert [step.site for step in model.plan.steps] == [site.name]
    assert "graphs compiled so far: 1" in str(model.report)
    assert "matched no Site" not in str(model.report)


def test_a_rule_for_no_layer_is_said_in_the_report() -> None:
    policy = ar.Policy(rules=[ar.Rule(where=ar.Where(layer="layers.7"), apply="window(size=4)")])
    model = compiled(Broken("between").eval(), policy, "eager")
    with torch.no_grad():
        model(torch.randn(2, 9, 32))
    assert "layer 'layers.7' of the policy matched no Site so far" in str(model.report)
