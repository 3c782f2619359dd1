"""Rows that are not found in full, each with its reason: `test_zoo` fails when one starts to
work."""

from __future__ import annotations

_DETECTS = (
    "not captured: the layer looks at the values of its mask to see whether it is causal "
    "(torch.nn.modules.transformer._detect_is_causal_mask), which a graph cannot"
)

# Architecture -> why.
EXCEPTIONS: dict[str, str] = {
    f"Transformer{stack}.{norm}.causal": _DETECTS
    for stack in ("Encoder", "Decoder")
    for norm in ("post_norm", "pre_norm", "gelu")
}
