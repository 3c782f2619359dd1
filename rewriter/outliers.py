"""Outliers of activations: what makes a model hard to quantise.

Source: Bondarenko et al. 2023 (Quantizable Transformers), section 5: the maximum of the infinity
norm and the kurtosis of the output of attention layers, averaged over data.
"""

from __future__ import annotations

from torch import Tensor


def infinity_norm(activations: Tensor) -> float:
    """The largest absolute value of each entry of the batch [B, ...], averaged over the batch."""
    return float(activations.double().flatten(1).abs().amax(1).mean())


def kurtosis(activations: Tensor) -> float:
    """E[(x - mean)^4] / (s^4 + 1e-6) of each entry [B, ...], averaged; 3 for normal numbers.

    s is the unbiased standard deviation.
    """
    rows = activations.double().flatten(1)
    deviation = rows - rows.mean(1, keepdim=True)
    spread = rows.std(1, correction=1) ** 4 + 1e-6
    return float(((deviation**4).mean(1) / spread).mean())
