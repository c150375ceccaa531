"""Normalisation of token features, by the names that configs use.

Source: Ba et al. 2016, arXiv:1607.06450 (LayerNorm); Zhang and Sennrich 2019, arXiv:1910.07467 (RMSNorm).
"""

from collections.abc import Callable
from functools import partial

from torch import nn

NormLayer = Callable[[int], nn.Module]

NORM_LAYERS: dict[str, NormLayer] = {
    "layernorm": partial(nn.LayerNorm, eps=1e-6),
    "layernormbf16": partial(nn.LayerNorm, eps=1e-5),  # variances below 1e-6 are noise in bfloat16
    "rmsnorm": partial(nn.RMSNorm, eps=1e-5),
}
