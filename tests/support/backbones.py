"""Tiny backbones of both families, for comparisons with other libraries."""

import torch

TINY = {"embed_dim": 48, "depth": 2, "num_heads": 4}
LEARNED = TINY | {"img_size": 98, "patch_size": 14, "init_values": 1.0}
REGISTERS = LEARNED | {"num_register_tokens": 4, "interpolate_antialias": True, "interpolate_offset": 0.0}
ROPE = TINY | {
    "patch_size": 16,
    "init_values": 1.0,
    "num_register_tokens": 4,
    "pos_embed_type": "rope",
    "pos_embed_rope_dtype": "fp32",
    "norm_layer": "layernormbf16",
    "mask_k_bias": True,
}


def load_converted(model, state):
    """Load official tensors of another library strictly; what no other library keeps stays as it was initialised."""
    own = model.state_dict()
    missing = {name for name in own if name not in state}
    assert all(name in ("mask_token", "rope_embed.periods") or name.endswith("bias_mask") for name in missing), missing
    model.load_state_dict(own | state, strict=True)
    return model.eval()


@torch.no_grad()
def assert_same_tokens(ours, theirs, sizes):
    """Compare class, register and patch tokens; 1e-4: float32 sums in another order, on values around 1."""
    for height, width in sizes:
        image = torch.randn(2, 3, height, width)
        features = ours.forward_features(image)
        got = [features["x_norm_clstoken"][:, None], features["x_norm_regtokens"], features["x_norm_patchtokens"]]
        want = theirs(image)
        assert want.std() > 0.1
        torch.testing.assert_close(torch.cat(got, dim=1), want, rtol=1e-4, atol=1e-4)
