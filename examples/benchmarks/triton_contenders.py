"""What the Triton benchmark runs: shapes, operands, and the contenders for each of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

WINDOW, BLOCK, DENSITY = 4096, 128, 0.25
Run = Callable[[], Any]


@dataclass(frozen=True)
class Shape:
    """One case: name, mask, batch, query and key heads, lengths, head dimension."""

    name: str
    mask: str
    b: int
    hq: int
    hkv: int
    q: int
    kv: int
    d: int


def operand_bytes(shape: Shape) -> int:
    """Bytes of Q, K, V and the result."""
    rows, keys = shape.hq * shape.q, shape.hkv * shape.kv
    return 2 * shape.b * shape.d * (2 * rows + 2 * keys)


def score_bytes(shape: Shape) -> int:
    """Bytes of the scores, in bfloat16 and in float32, as plain operators hold them."""
    return 6 * shape.b * shape.hq * shape.q * shape.kv


def cascade_of(shape: Shape) -> Any:
    """The attention as a cascade."""
    from attn_rewrite.cascade.attention import QK, SoftmaxAttention, softmax_cascade
    from attn_rewrite.cascade.expr import KV, TRUE, Extent, H, Q, Read
    from attn_rewrite.cascade.ir import TensorDecl

    guards: dict[str, Any] = {
        "dense": TRUE,
        "causal": Q - KV >= 0,
        "cached": Q + Extent("kv") - Extent("q") >= KV,
        "window": (Q - KV >= 0) & (Q - KV < WINDOW),
        "blocks": Read("keep", (H, Q // BLOCK, KV // BLOCK)),
    }
    reads = (TensorDecl("keep", ("h", "qb", "kb"), dtype="bool"),) if shape.mask == "blocks" else ()
    form = SoftmaxAttention(
        QK * shape.d**-0.5, guards[shape.mask], group=shape.hq // shape.hkv, reads=reads
    )
    return softmax_cascade(form, "bench")


def operands(shape: Shape, device: str = "cuda") -> dict[str, Any]:
    """Random bfloat16 operands on the GPU, and the table of blocks."""
    import torch

    torch.manual_seed(0)

    def normal(heads: int, length: int) -> Any:
        size = (shape.b, heads, length, shape.d)
        return torch.randn(size, device=device, dtype=torch.bfloat16)

    found = {
        "Q": normal(shape.hq, shape.q),
        "K": normal(shape.hkv, shape.kv),
        "V": normal(shape.hkv, shape.kv),
    }
    if shape.mask == "blocks":
        blocks = (shape.hq, -(-shape.q // BLOCK), -(-shape.kv // BLOCK))
        found["keep"] = torch.rand(blocks, device=device) < DENSITY
    return found


def contenders(shape: Shape, x: dict[str, Any]) -> dict[str, Callable[[], Run]]:
    """What makes the runs of this shape, by name; some fail to be made on some machines."""
    found: dict[str, Callable[[], Run]] = {"attn-rewrite": lambda: _own(shape, x)}
    found |= _sdpa(shape, x)
    found["flex"] = lambda: _flex(shape, x)
    found["eager, compiled"] = lambda: _eager(shape, x)
    return found


def _own(shape: Shape, x: dict[str, Any]) -> Run:
    from attn_rewrite.backends.triton.decode import decode
    from attn_rewrite.backends.triton.lower import lower
    from attn_rewrite.graph import EagerBuilder

    cascade = cascade_of(shape)
    if shape.mask == "cached":
        return lambda: decode(cascade, x)
    kernel: Any = lower(cascade, extents={"q": shape.q, "kv": shape.kv})
    inputs = list(x.values())
    return lambda: kernel.emit(EagerBuilder(), inputs)


def tune_for(shape: Shape, x: dict[str, Any]) -> dict[str, str]:
    """Tune what `contenders` runs of attn-rewrite; the schedules found, as text, by kernel."""
    from attn_rewrite.backends.triton.schedule import to_text
    from attn_rewrite.backends.triton.tune import tune, tune_decode

    cascade = cascade_of(shape)
    found = tune_decode(cascade, x) if shape.mask == "cached" else {"attention": tune(cascade, x)}
    return {kernel: to_text(schedule) for kernel, schedule in found.items()}


SDPA = ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH")


def _sdpa(shape: Shape, x: dict[str, Any]) -> dict[str, Callable[[], Run]]:
    """PyTorch's kernels, each by name; window and blocks reach them as a tensor of truths."""
    return {f"sdpa {n.lower()}": (lambda n=n: _sdpa_run(shape, x, n)) for n in SDPA}


def _sdpa_run(shape: Shape, x: dict[str, Any], name: str) -> Run:
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    plain = shape.mask in ("dense", "causal") or (shape.mask == "cached" and shape.q == 1)
    _fits(0 if plain else mask_bytes(shape), "its mask", x)
    _fits(score_bytes(shape) if name == "MATH" else 0, "its scores", x)
    mask = None if plain else _mask(shape, x)

    def run() -> Any:
        with sdpa_kernel(getattr(SDPBackend, name)):
            return torch.nn.functional.scaled_dot_product_attention(
                x["Q"], x["K"], x["V"], mask, is_causal=shape.mask == "causal",
                enable_gqa=shape.hq != shape.hkv,
            )  # fmt: skip

    return run


def mask_bytes(shape: Shape) -> int:
    """Bytes of a mask that is a tensor, one for each head where heads differ."""
    return shape.q * shape.kv * (shape.hq if shape.mask == "blocks" else 1)


def _mask(shape: Shape, x: dict[str, Any]) -> Any:
    """True = keep, [q, kv] or [h, q, kv]."""
    import torch

    device = x["Q"].device
    shift = shape.kv - shape.q if shape.mask == "cached" else 0
    at_q = torch.arange(shape.q, device=device)[:, None] + shift
    at_k = torch.arange(shape.kv, device=device)
    if shape.mask == "blocks":
        return x["keep"][:, at_q // BLOCK, at_k // BLOCK]
    kept = at_q >= at_k
    return kept & (at_q - at_k < WINDOW) if shape.mask == "window" else kept


def _fits(size: int, what: str, x: dict[str, Any]) -> None:
    """`MemoryError` unless ``size`` bytes are half of what is free on the GPU, or less."""
    import torch

    if x["Q"].device.type == "cuda" and size > torch.cuda.mem_get_info()[0] // 2:
        raise MemoryError(f"{what} would take {size >> 30} GiB")


def _flex(shape: Shape, x: dict[str, Any]) -> Run:
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    keep, offset = x.get("keep"), shape.kv - shape.q
    rules: dict[str, Any] = {
        "causal": lambda b, h, q, k: q >= k,
        "cached": lambda b, h, q, k: k <= q + offset,
        "window": lambda b, h, q, k: (q >= k) & (q - k < WINDOW),
        "blocks": lambda b, h, q, k: keep[h, q // BLOCK, k // BLOCK],
    }
    mask = None
    if shape.mask in rules:
        heads = shape.hq if shape.mask == "blocks" else None
        make = torch.compile(create_block_mask)
        mask = make(rules[shape.mask], None, heads, shape.q, shape.kv, device=x["Q"].device)
    compiled: Any = torch.compile(flex_attention, dynamic=False)
    grouped = shape.hq != shape.hkv
    return lambda: compiled(x["Q"], x["K"], x["V"], block_mask=mask, enable_gqa=grouped)


def _eager(shape: Shape, x: dict[str, Any]) -> Run:
    import torch

    _fits(score_bytes(shape), "its scores", x)
    group = shape.hq // shape.hkv

    def attend(q: Any, k: Any, v: Any) -> Any:
        k, v = (t.repeat_interleave(group, 1) for t in (k, v))
        s = q @ k.mT * shape.d**-0.5
        if shape.mask != "dense":
            s = s.masked_fill(~_mask(shape, x), -torch.inf)
        return s.softmax(-1) @ v

    compiled = torch.compile(attend)
    return lambda: compiled(x["Q"], x["K"], x["V"])
