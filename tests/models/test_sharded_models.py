"""Backbones sharded over two ranks give the features and gradients of one process."""

import functools

import pytest
import torch
from support.dist import run_distributed

from dinov2 import fsdp
from dinov2.models import DinoVisionTransformer, ResNet


def vit():
    return DinoVisionTransformer(
        img_size=32,
        patch_size=8,
        embed_dim=32,
        depth=2,
        num_heads=2,
        init_values=0.5,
        num_register_tokens=2,
        mask_k_bias=True,
        untie_cls_and_patch_norms=True,
        untie_global_and_local_cls_norm=True,
        pos_embed_type="rope",
        pos_embed_rope_dtype="fp32",
    )


def resnet():
    return ResNet("resnet18", sync_batchnorm=True)


def run(model):
    """Return the patch tokens of two crop sizes and the gradients of a sum over all features."""
    torch.manual_seed(0)
    images = [torch.randn(2, 3, 64, 64), torch.randn(3, 3, 32, 64)]
    features = model(images, is_training=True)
    names = ("x_norm_clstoken", "x_norm_patchtokens")
    sum(part[name].float().square().mean() for part in features for name in names).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return [part["x_norm_patchtokens"].detach().float() for part in features], gradients


def note_type_of_angles(types, module, args):
    types.append(str(args[2][0].cos.dtype))


def compare_with_one_process():
    """Return, for each network, the largest differences, and the types of the angles under mixed precision."""
    found = {}
    for make in (vit, resnet):
        plain, sharded, rounded = make(), make(), make()
        for model in (sharded, rounded):
            model.load_state_dict(plain.state_dict())
        fsdp.shard(sharded, strategy="FULL_SHARD")
        features, gradients = run(sharded)
        want_features, want_gradients = run(plain)
        assert gradients.keys() == want_gradients.keys()
        pairs = [*zip(features, want_features, strict=True)]
        pairs += [(gradients[name].full_tensor(), want_gradients[name]) for name in gradients]
        found[make.__name__] = max((got - want).abs().max().item() for got, want in pairs)

        fsdp.shard(rounded, strategy="FULL_SHARD", param_dtype=torch.bfloat16)
        types = []
        if make is vit:
            for block in rounded.blocks:
                block.attn.register_forward_pre_hook(functools.partial(note_type_of_angles, types))
        features, _ = run(rounded)
        found[f"{make.__name__} rounded"] = max(
            (got - want).abs().mean().item() / want.abs().mean().item()
            for got, want in zip(features, want_features, strict=True)
        )
        found[f"{make.__name__} angles"] = types
    return found


@pytest.mark.dist
def test_sharded_models_agree_with_one_process_and_angles_keep_their_type():
    for found in run_distributed(compare_with_one_process):
        assert found["vit"] < 1e-5
        assert found["resnet"] < 1e-4  # batch statistics are summed in another order
        assert found["vit angles"] == ["torch.float32"] * 2
        assert found["vit rounded"] < 0.05 and found["resnet rounded"] < 0.1  # bfloat16 keeps 8 bits
