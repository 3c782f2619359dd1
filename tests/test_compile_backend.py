"""The torch.compile front end: the same numbers in inference, training, generation and autocast."""

from __future__ import annotations

import pytest
import torch

import attn_rewrite as ar
from attn_rewrite.compile_backend import Session, attn_rewrite, compiled, read_options
from attn_rewrite.errors import PolicyError
from tests.test_optimize import Block, reference

transformers = pytest.importorskip("transformers")


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
    }  # fmt: skip
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
    if kind == "qwen3":
        return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**common, head_dim=16)).eval()
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**common)).eval()


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3"])
def test_generate(kind: str, implementation: str) -> None:
    """Greedy tokens are equal, and every site ran rewritten in prefill and in decode."""
    model = small(kind, implementation)
    ids = torch.randint(3, 100, (2, 9))
    options = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
    wanted = model.generate(ids, **options)
    module = compiled(model, ar.Policy.parse("exact"), compiler="eager")
    assert torch.equal(module.generate(ids, **options), wanted)
    graphs = module.session.graphs
    assert len(graphs) >= 2
    lengths = [str(g.sites[0].q_len) for g in graphs]
    assert "1" in lengths
    assert len(set(lengths)) > 1
    for graph in graphs:
        assert len(graph.sites) == 2
        assert set(graph.kernels) == {s.name for s in graph.sites}


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
