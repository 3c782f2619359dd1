"""One attention in many spellings: every function computes softmax(q k^T / sqrt(d)) v.

q, k, v are [batch, heads, length, width]; each returns the same values up to rounding.  The finder
must
bring all of them to one cascade.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
PLAIN: dict[str, Attention] = {}
CAUSAL: dict[str, Attention] = {}


def plain(function: Attention) -> Attention:
    PLAIN[function.__name__] = function
    return function


def causal(function: Attention) -> Attention:
    CAUSAL[function.__name__] = function
    return function


def root(x: Tensor) -> float:
    return math.sqrt(x.shape[-1])


@plain
def sdpa(q, k, v):
    return F.scaled_dot_product_attention(q, k, v)


@plain
def sdpa_explicit_scale(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, scale=1 / root(q))


@plain
def divide_scores(q, k, v):
    return (q @ k.transpose(-1, -2) / root(q)).softmax(-1) @ v


@plain
def multiply_scores(q, k, v):
    return torch.matmul(torch.softmax(torch.matmul(q, k.mT) * root(q) ** -1, dim=3), v)


@plain
def scale_query(q, k, v):
    return ((q / root(q)) @ k.transpose(2, 3)).softmax(-1) @ v


@plain
def scale_key(q, k, v):
    return (q @ (k * (1 / root(k))).transpose(2, 3)).softmax(-1) @ v


@plain
def scale_both(q, k, v):
    s = q.shape[-1] ** -0.25
    return ((q * s) @ (k * s).transpose(2, 3)).softmax(-1) @ v


@plain
def einsum_letters(q, k, v):
    a = torch.einsum("bhqd,bhkd->bhqk", q, k) / root(q)
    return torch.einsum("bhqk,bhkd->bhqd", a.softmax(-1), v)


@plain
def einsum_other_order(q, k, v):
    a = torch.einsum("xytz,xysz->xyst", k, q).mul(1 / root(q)).softmax(dim=-1)
    return torch.einsum("acef,acdf->acde", v.transpose(2, 3), a.contiguous())


@plain
def einsum_ellipsis(q, k, v):
    a = torch.einsum("...id,...jd->...ij", q, k) / root(q)
    return torch.einsum("...ij,...jd->...id", F.softmax(a, dim=-1), v)


@plain
def keys_first_scores(q, k, v):
    """The score tensor is [b, h, kv, q] and the softmax runs over dim -2."""
    a = (k @ q.transpose(-1, -2) / root(q)).softmax(dim=-2)
    return a.transpose(-1, -2) @ v


@plain
def keys_first_product(q, k, v):
    a = (k @ q.mT / root(q)).softmax(dim=-2)
    return (v.mT @ a).mT


@plain
def packed_heads(q, k, v):
    b, h, s, d = q.shape
    q, k, v = (x.reshape(b * h, x.shape[2], d) for x in (q, k, v))
    a = torch.bmm(q, k.transpose(1, 2)) / root(q)
    return torch.bmm(a.softmax(-1), v).view(b, h, s, d)


@plain
def baddbmm(q, k, v):
    b, h, s, d = q.shape
    q, k, v = (x.reshape(b * h, x.shape[2], d) for x in (q, k, v))
    empty = torch.zeros(1, dtype=q.dtype, device=q.device).expand(b * h, s, k.shape[1])
    a = torch.baddbmm(empty, q, k.mT, beta=0, alpha=1 / root(q))
    return torch.bmm(a.softmax(-1), v).view(b, h, s, d)


@plain
def length_first(q, k, v):
    q, k, v = (x.permute(2, 0, 1, 3) for x in (q, k, v))
    a = torch.einsum("ibnd,jbnd->bnij", q, k) / root(q)
    return torch.einsum("bnij,jbnd->ibnd", a.softmax(-1), v).permute(1, 2, 0, 3)


@plain
def transposed_keys(q, k, v):
    keys = k.permute(0, 1, 3, 2).contiguous()
    return F.softmax(q @ keys / root(q), -1) @ v


@plain
def exp_and_sum(q, k, v):
    e = (q @ k.mT / root(q)).exp()
    return (e / e.sum(-1, keepdim=True)) @ v


@plain
def shifted_exp(q, k, v):
    s = q @ k.mT / root(q)
    e = torch.exp(s - s.amax(-1, keepdim=True))
    return (e / e.sum(dim=-1, keepdim=True)) @ v


@plain
def shifted_exp_max_values(q, k, v):
    s = q @ k.mT / root(q)
    e = torch.exp(s - s.max(dim=-1, keepdim=True).values)
    return (
        (e * (1.0 / e.sum(dim=-1, keepdim=True))) @ v
        if False
        else (e / e.sum(-1).unsqueeze(-1)) @ v
    )


@plain
def late_division(q, k, v):
    s = q @ k.mT / root(q)
    e = torch.exp(s - s.amax(-1, keepdim=True).detach())
    return (e @ v) / e.sum(-1, keepdim=True)


@plain
def log_softmax_exp(q, k, v):
    return F.log_softmax(q @ k.mT / root(q), dim=-1).exp() @ v


@plain
def minus_logsumexp(q, k, v):
    s = q @ k.mT / root(q)
    return torch.exp(s - torch.logsumexp(s, -1, keepdim=True)) @ v


@plain
def in_place(q, k, v):
    s = q @ k.mT
    s.div_(root(q))
    p = s.softmax(-1)
    return p @ v


@plain
def in_place_multiply(q, k, v):
    s = torch.matmul(q, k.transpose(2, 3))
    s *= 1 / root(q)
    return torch.matmul(F.softmax(s, dim=-1), v)


@plain
def upcast(q, k, v):
    s = q @ k.mT / root(q)
    return s.float().softmax(-1).to(q.dtype) @ v


@plain
def upcast_dtype(q, k, v):
    return F.softmax(q @ k.mT / root(q), dim=-1, dtype=torch.float32).type_as(q) @ v


@plain
def eval_dropout(q, k, v):
    a = F.dropout(F.softmax(q @ k.mT / root(q), dim=-1), p=0.1, training=False)
    return a.contiguous().clone() @ v


@plain
def product_and_sum(q, k, v):
    s = (q.unsqueeze(3) * k.unsqueeze(2)).sum(-1) / root(q)
    return (s.softmax(-1).unsqueeze(-1) * v.unsqueeze(2)).sum(3)


@plain
def head_loop_free_linear(q, k, v):
    """Scores by an einsum without the batch's order, values by matmul on a permuted layout."""
    s = torch.einsum("nhqd,nhkd->hnqk", q, k) / root(q)
    return torch.matmul(s.softmax(-1), v.transpose(0, 1)).transpose(0, 1)


@plain
def split_qkv(q, k, v):
    qkv = torch.stack([q, k, v])
    q, k, v = qkv.unbind(0)
    return (q @ k.mT / root(q)).softmax(-1) @ v


@plain
def chunked_qkv(q, k, v):
    q, k, v = torch.cat([q, k, v], -1).chunk(3, dim=-1)
    return (q @ k.mT / root(q)).softmax(-1) @ v


@plain
def nan_guard(q, k, v):
    a = (q @ k.mT / root(q)).softmax(-1)
    return torch.nan_to_num(a, nan=0.0) @ v


@plain
def five_dimensions(q, k, v):
    h = q.shape[1]
    q, k, v = (x.unflatten(1, (2, h // 2)) for x in (q, k, v))
    return ((q @ k.mT / root(q)).softmax(-1) @ v).flatten(1, 2)


@plain
def log_two(q, k, v):
    """Scores doubled and halved again around a view."""
    b, h, s, _ = q.shape
    scores = (q @ k.mT * (2 / root(q))).view(b, h * s, -1) * 0.5
    return scores.view(b, h, s, -1).softmax(-1) @ v


@plain
def special_softmax(q, k, v):
    return torch.special.softmax(q @ k.mT / root(q), -1) @ v


@plain
def powers_of_two(q, k, v):
    e = torch.exp2(q @ k.mT * (math.log2(math.e) / root(q)))
    return (e / e.sum(-1, keepdim=True)) @ v


@plain
def power_with_a_base(q, k, v):
    e = 2.0 ** (q @ k.mT * (math.log2(math.e) / root(q)))
    return (e * e.sum(-1, keepdim=True).pow(-1)) @ v


@plain
def normalized_exponentials(q, k, v):
    return F.normalize(torch.exp(q @ k.mT / root(q)), p=1, dim=-1) @ v


@plain
def one_over_the_sum(q, k, v):
    e = torch.exp(q @ k.mT / root(q))
    return ((1.0 / e.sum(-1, keepdim=True)) * e) @ v


@plain
def late_division_of_an_einsum(q, k, v):
    e = torch.exp(torch.einsum("bhqd,bhkd->bhqk", q, k) / root(q))
    return torch.einsum("bhqk,bhkd->bhqd", e, v) / e.sum(-1)[..., None]


@plain
def softmin(q, k, v):
    return F.softmin(-(q @ k.mT) / root(q), dim=-1) @ v


@plain
def aliases(q, k, v):
    s = torch.divide(torch.multiply(q, 2.0) @ k.mT, root(q))
    return torch.true_divide(s, 2.0).softmax(-1) @ v


@plain
def moved_axes(q, k, v):
    s = (q @ k.movedim(-1, -2) / root(q)).moveaxis(3, 0)
    return s.softmax(0).movedim(0, -1) @ v


@plain
def narrowed_columns(q, k, v):
    z, d = torch.cat([q, k, v], -1), q.shape[-1]
    q, k, v = (z.narrow(-1, i * d, d) for i in range(3))
    return (q @ k.mT / root(q)).softmax(-1) @ v


@plain
def logarithm_of_the_sum(q, k, v):
    s = q @ k.mT / root(q)
    return (s - s.exp().sum(-1, keepdim=True).log()).exp() @ v


@plain
def sum_as_an_einsum(q, k, v):
    e = torch.exp(q @ k.mT / root(q))
    return (e / torch.einsum("bhqk->bhq", e)[..., None]) @ v


@plain
def keys_first_axis(q, k, v):
    a = torch.einsum("bhqd,bhkd->kbhq", q, k) / root(q)
    return torch.einsum("kbhq,bhkd->bhqd", a.softmax(0), v)


def keep(s: Tensor) -> Tensor:
    return torch.ones(s.shape[-2:], dtype=torch.bool, device=s.device).tril()


@causal
def sdpa_causal(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@causal
def sdpa_bool_mask(q, k, v):
    n = torch.arange(q.shape[2])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=n[:, None] >= n[None, :])


@causal
def sdpa_float_mask(q, k, v):
    s = q.shape[2]
    mask = torch.full((s, s), -math.inf).triu(1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@causal
def masked_fill_triu(q, k, v):
    s = q @ k.mT / root(q)
    drop = torch.triu(torch.ones(s.shape[-2], s.shape[-1], dtype=torch.bool), diagonal=1)
    return s.masked_fill(drop, -math.inf).softmax(-1) @ v


@causal
def where_tril(q, k, v):
    s = q @ k.mT / root(q)
    return torch.where(keep(s), s, torch.finfo(s.dtype).min).softmax(-1) @ v


@causal
def added_mask(q, k, v):
    s = q @ k.mT / root(q)
    return (s + torch.where(keep(s), 0.0, -math.inf)).softmax(-1) @ v


@causal
def mask_first_in_the_sum(q, k, v):
    s = q @ k.mT / root(q)
    bias = (1.0 - keep(s).to(s.dtype)) * torch.finfo(s.dtype).min
    return (bias + s).softmax(-1) @ v


@causal
def positions_compared(q, k, v):
    s = q @ k.mT / root(q)
    rows = torch.arange(s.shape[-2]).view(1, 1, -1, 1)
    columns = torch.arange(s.shape[-1]).view(1, 1, 1, -1)
    return s.masked_fill(~(columns <= rows), torch.finfo(s.dtype).min).softmax(-1) @ v


@causal
def difference_of_positions(q, k, v):
    s = q @ k.mT / root(q)
    n = torch.arange(s.shape[-1])
    return s.masked_fill((n[None, :] - n[:, None]) > 0, -math.inf).softmax(-1) @ v


@causal
def in_place_mask(q, k, v):
    s = q @ k.mT / root(q)
    s.masked_fill_(torch.logical_not(keep(s)), -math.inf)
    return s.softmax(-1) @ v


@causal
def masked_before_scale(q, k, v):
    s = (q @ k.mT).masked_fill(torch.logical_not(keep(q @ k.mT)), -math.inf)
    return (s / root(q)).softmax(-1) @ v


@causal
def masked_exponential(q, k, v):
    s = q @ k.mT / root(q)
    e = torch.exp(s) * keep(s).to(s.dtype)
    return (e / e.sum(-1, keepdim=True)) @ v


@causal
def exponential_filled_with_zeros(q, k, v):
    s = q @ k.mT / root(q)
    e = torch.exp(s).masked_fill(~keep(s), 0.0)
    return (e / e.sum(-1, keepdim=True)) @ v


@causal
def renormalised(q, k, v):
    s = q @ k.mT / root(q)
    p = s.softmax(-1) * torch.ones_like(s[0, 0]).tril()
    return (p / p.sum(-1, keepdim=True)) @ v


@causal
def logarithm_of_the_mask(q, k, v):
    s = q @ k.mT / root(q)
    return (s + torch.log(torch.ones(s.shape[-2], s.shape[-1]).tril())).softmax(-1) @ v


@causal
def filled_and_cut_in_place(q, k, v):
    n = q.shape[2]
    mask = torch.empty(n, n).fill_(-math.inf)
    mask.triu_(1)
    return (q @ k.mT / root(q) + mask).softmax(-1) @ v


@causal
def grid_of_positions(q, k, v):
    n = torch.arange(q.shape[2])
    i, j = torch.meshgrid(n, n, indexing="ij")
    return torch.where(torch.less(i, j), -math.inf, q @ k.mT / root(q)).softmax(-1) @ v


@causal
def counted_positions(q, k, v):
    ones = torch.ones(q.shape[2], q.shape[2])
    drop = ones.cumsum(-1) > ones.cumsum(-2)
    return (q @ k.mT / root(q)).masked_fill(drop, -math.inf).softmax(-1) @ v


@plain
def products_kept_and_summed(q, k, v):
    s = (q[:, :, :, None] * k[:, :, None]).sum(-1, keepdim=True) / root(q)
    return (s.softmax(3) * v[:, :, None]).sum(3)


@plain
def late_reciprocal(q, k, v):
    s = q @ k.mT / root(q)
    e = (s - s.amax(-1, True)).exp()
    return (e @ v) * e.sum(-1, True).reciprocal()


@plain
def logarithm_of_a_shifted_sum(q, k, v):
    s = q @ k.mT / root(q)
    m = s.amax(-1, keepdim=True)
    return (s - (m + (s - m).exp().sum(-1, keepdim=True).log())).exp() @ v


@plain
def scaled_after_the_shift(q, k, v):
    s = q @ k.mT
    e = ((s - s.amax(-1, keepdim=True)) / root(q)).exp()
    return (e / e.sum(-1, keepdim=True)) @ v


@plain
def powers_of_two_below_the_largest(q, k, v):
    s = q @ k.mT / root(q)
    e = torch.exp2((s - s.amax(-1, keepdim=True)) * math.log2(math.e))
    return (e / e.sum(-1, keepdim=True)) @ v


@plain
def epsilon_below_rounding(q, k, v):
    s = q @ k.mT / root(q)
    e = (s - s.amax(-1, keepdim=True)).exp()
    return (e / (e.sum(-1, keepdim=True) + 1e-30)) @ v


@plain
def a_tensor_per_row_added(q, k, v):
    return (q @ k.mT / root(q) + q.sum(-1, keepdim=True)).softmax(-1) @ v


@causal
def lower_triangle_of_exponentials(q, k, v):
    e = (q @ k.mT / root(q)).exp().tril()
    return (e / e.sum(-1, keepdim=True)) @ v


@causal
def lower_triangle_renormalised(q, k, v):
    p = (q @ k.mT / root(q)).softmax(-1).tril()
    return (p / p.sum(-1, keepdim=True)) @ v


@causal
def scores_set_by_a_mask(q, k, v):
    s = q @ k.mT / root(q)
    s[:, :, ~keep(s)] = -math.inf
    return s.softmax(-1) @ v


@causal
def bias_set_by_a_mask(q, k, v):
    s = q @ k.mT / root(q)
    bias = torch.zeros(s.shape[-2:], dtype=s.dtype)
    bias[~keep(s)] = -math.inf
    return (s + bias).softmax(-1) @ v


@causal
def mask_repeated_over_the_batch(q, k, v):
    s = q @ k.mT / root(q)
    mask = keep(s)[None, None].repeat(q.shape[0], q.shape[1], 1, 1)
    return s.masked_fill(mask.logical_not(), -math.inf).softmax(-1) @ v


@causal
def shifted_and_masked_exponentials(q, k, v):
    s = (q @ k.mT / root(q)).masked_fill(~keep(q @ k.mT), -math.inf)
    e = (s - s.amax(-1, keepdim=True)).exp() * keep(s)
    return (e / e.sum(-1, keepdim=True)) @ v
