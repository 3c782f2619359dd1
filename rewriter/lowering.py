"""Which backend lowers a site: torch anywhere, Triton where a GPU runs its kernels."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from attn_rewrite.backends.torch.blocks import choose_block
from attn_rewrite.backends.torch.form import is_causal_with_offset
from attn_rewrite.backends.torch.lower import Kernel, emit_tiled, in_new_order, lower
from attn_rewrite.cascade.attention import as_softmax
from attn_rewrite.cascade.expr import conjuncts
from attn_rewrite.cascade.ir import Cascade
from attn_rewrite.cascade.reordered import as_reordered
from attn_rewrite.errors import LowerError, PolicyError
from attn_rewrite.site import Refusal, Site
from attn_rewrite.tables import Table

if TYPE_CHECKING:
    import torch

BACKENDS = ("auto", "torch", "triton")


def check_backend(name: str) -> None:
    """`PolicyError` for an unknown backend, `LowerError` for one that cannot run here."""
    if name not in BACKENDS:
        raise PolicyError(
            f"backend {name!r} is not available; this version has: {', '.join(BACKENDS)}"
        )
    if name != "triton":
        return
    if importlib.util.find_spec("triton") is None:
        raise LowerError(
            "backend 'triton' needs the triton package, which is not installed; install "
            "attn-rewrite[triton], or use backend='torch'"
        )
    if not _has_gpu() and not _interpreted():
        raise LowerError(
            "backend 'triton' runs on an NVIDIA or AMD GPU and this process sees none; use "
            "backend='torch' here, or compile ahead of time with --export triton:cuda:90"
        )


def lower_site(
    site: Site,
    cascade: Cascade,
    backend: str = "auto",
    tables: Mapping[str, Table] | None = None,
) -> tuple[Kernel | Refusal, int]:
    """The kernel for the place of ``site``, and the side of its tiles.

    ``onnx`` (for programs that only leave as files) is torch, but a mask that follows the length
    of a cache stays an expression.  ``auto``: torch, unless the operands are on a GPU, the kernel
    is not one of PyTorch's own fused ones, and the Triton backend can lower it.  ``triton`` refuses
    what it cannot lower.
    """
    extents = {n: v if isinstance(v, int) else None for n, v in site.extents().items()}
    block = choose_block(cascade, extents, tables)
    operand = site.inputs["Q"].node.meta["val"]
    if backend == "triton":
        return _triton(site, cascade, extents, operand), block
    lse = site.lse is not None
    kernel = lower(cascade, dropout=site.dropout, block=block, extents=extents, lse=lse)
    if backend == "onnx":
        return _with_its_cascade(kernel, cascade, block), block
    on_gpu = operand.device.type == "cuda" and importlib.util.find_spec("triton") is not None
    if backend == "torch" or not on_gpu or (isinstance(kernel, Kernel) and kernel.name == "sdpa"):
        return kernel, block
    generated = _triton(site, cascade, extents, operand)
    if isinstance(generated, Refusal):
        return _without_triton(kernel, generated), block
    return generated, block


def _with_its_cascade(kernel: Kernel | Refusal, cascade: Cascade, block: int) -> Kernel | Refusal:
    """Queries at the end of a cache as the operator that holds its cascade, not as a mask."""
    form = as_softmax(cascade)
    if isinstance(kernel, Refusal) or form is None or kernel.name != "sdpa":
        return kernel
    if not any(map(is_causal_with_offset, conjuncts(form.guard))):
        return kernel
    emit = partial(emit_tiled, str(cascade), block)
    return replace(kernel, name="tiled", why="causal, at the end of a cache", _emit=emit)


def _without_triton(kernel: Kernel | Refusal, refusal: Refusal) -> Kernel | Refusal:
    """What torch makes of the site, with the reason why Triton does not."""
    if isinstance(kernel, Refusal):
        return replace(kernel, reason=f"{kernel.reason}; Triton: {refusal.reason}")
    return replace(kernel, why=f"{kernel.why}; Triton: {refusal.reason}")


def _triton(
    site: Site, cascade: Cascade, extents: dict[str, int | None], operand: torch.Tensor
) -> Kernel | Refusal:
    from attn_rewrite.backends.triton.lower import lower as lower_to_triton
    from attn_rewrite.backends.triton.prepare import device_of

    if operand.element_size() > 4:
        return Refusal(
            "dtype", f"Triton kernels compute in float32, and the operands are {operand.dtype}"
        )
    found = as_reordered(cascade)
    kernel = lower_to_triton(
        cascade if found is None else found.inner, dropout=site.dropout, extents=extents,
        device=device_of(operand), item_bytes=operand.element_size(), lse=site.lse is not None,
    )  # fmt: skip
    if found is None or isinstance(kernel, Refusal):
        return kernel
    return in_new_order(kernel, found, cascade)


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _interpreted() -> bool:
    import triton

    return bool(triton.knobs.runtime.interpret)
