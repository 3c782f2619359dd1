"""`flex_attention` that was not rewritten, written out in plain operators before it leaves.

torch's exporter has no translation of the operator, nor of the sorts that list the blocks of its
mask.  The lists only say where the mask is empty: written out, scores are computed for all keys,
and nothing reads them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.export import ExportedProgram

Mod = Callable[..., torch.Tensor]
_FLEX = torch.ops.higher_order.flex_attention


def dense_flex(
    operands: Sequence[torch.Tensor],
    score_mod: Mod,
    mask_mod: Mod,
    scale: float,
    buffers: Sequence[Sequence[torch.Tensor]],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the operator computes of q [b, hq, s, d], k [b, hkv, t, d] and v [b, hkv, t, f]: the
    output [b, hq, s, f], the log-sum-exp and the maximum of its scores [b, hq, s], both over ln 2.

    Scores are float32 or wider.  A row without keys has an output of 0 and a log-sum-exp of -inf.
    """
    q, k, v = operands
    group, wide = q.shape[1] // k.shape[1], torch.promote_types(q.dtype, torch.float32)
    k, v = (x.repeat_interleave(group, 1) if group > 1 else x for x in (k, v))
    score = q.to(wide) @ k.to(wide).mT * scale
    # The functions are of single positions; their operators broadcast.
    places = [
        torch.arange(n, device=q.device).view([-1 if i == axis else 1 for i in range(4)])
        for axis, n in enumerate(score.shape)
    ]
    score = torch.where(
        mask_mod(*places, *buffers[1]), score_mod(score, *places, *buffers[0]), -math.inf
    )
    top = score.amax(-1, keepdim=True)
    shift = torch.where(top == -math.inf, 0.0, top)
    shares = (score - shift).exp()
    total = shares.sum(-1, keepdim=True)
    empty = total == 0
    p = shares / torch.where(empty, 1.0, total)
    statistic = (shift + total.log()).squeeze(-1)
    return p.to(q.dtype) @ v.to(q.dtype), statistic / math.log(2), top.squeeze(-1) / math.log(2)


def without_flex(program: ExportedProgram) -> ExportedProgram:
    """``program`` with every `flex_attention` written out; the same object without any.

    Raises `CaptureError` where the result cannot be exported again.
    """
    if not any(n.target is _FLEX for n in program.graph.nodes):
        return program
    from attn_rewrite.apply import sweep
    from attn_rewrite.reexport import export_again

    module = program.module()
    for node in list(module.graph.nodes):
        if node.target is not _FLEX:
            continue
        q, k, v, score_mod, block_mask, scale = node.args[:6]
        buffers = [*node.args[7:9], (), ()][:2]
        args: tuple[Any, ...] = ((q, k, v), score_mod, block_mask[-1], scale, buffers)
        with module.graph.inserting_before(node):
            made = module.graph.call_function(dense_flex, args)
        made.meta = dict(node.meta)
        node.replace_all_uses_with(made)
        module.graph.erase_node(node)
    sweep(module.graph)
    module.recompile()
    return export_again(module, program)
