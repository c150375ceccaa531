"""Facts of DINOv3's tensors that other libraries keep in their settings, or not at all."""

import torch

from dinov2.errors import CheckpointError
from dinov2.hub.formats_naming import slice_part
from dinov2.hub.stored_tensor import State, StoredTensor

_OFFICIAL_BASE = 100.0


def rope_base(periods: StoredTensor | None) -> float:
    """Return the base of RoPE from its periods, base^(k / n) for k = 0 to n - 1; 100 where a file has none.

    Periods may have been rounded to bfloat16, so that a base within 2 % of the official 100 is 100.

    Raises:
        CheckpointError: the periods were made from a shortest and a longest one, which other libraries cannot do.
    """
    if periods is None or periods.shape[0] < 2:
        return _OFFICIAL_BASE
    values = periods.read().double()
    num = values.shape[0]
    base = values[-1].item() ** (num / (num - 1))
    made = base ** (torch.arange(num, dtype=torch.float64) / num)
    if not torch.allclose(values, made, rtol=0.01):
        raise CheckpointError(
            f"its RoPE periods run from {values[0]:.4g} to {values[-1]:.4g} and follow from no base, as timm and "
            "Hugging Face need; export it as dinov2"
        )
    return _OFFICIAL_BASE if abs(base / _OFFICIAL_BASE - 1) < 0.02 else round(base, 3)


def apply_bias_mask(state: State) -> State:
    """Multiply the masks of queries', keys' and values' biases in, and leave the masks out."""
    applied = dict(state)
    for name in [name for name in state if name.endswith(".bias_mask")]:
        bias_name = name.removesuffix("_mask")
        bias, mask = state[bias_name], applied.pop(name)
        applied[bias_name] = bias.map(bias.shape, lambda values, mask=mask: values * mask.read().to(values.dtype))
    return applied


def has_key_bias(state: State) -> bool:
    """Read the biases of official names, masks applied, and say whether a key has one that is not zero."""
    biases = [tensor for name, tensor in state.items() if name.endswith("attn.qkv.bias")]
    return any(bool(torch.count_nonzero(slice_part(bias, 1, 3).read())) for bias in biases)
