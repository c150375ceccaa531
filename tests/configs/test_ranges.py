"""Each key refuses values out of its range, saying what it must be."""

import pytest

from dinov2.configs import load_config
from dinov2.errors import ConfigError


@pytest.mark.parametrize(
    ("override", "must_be"),
    [
        ("compute_precision.hybrid_shard_size=-1", "at least 1 rank, or null"),
        ("dino.loss_weight=-0.5", "at least 0"),
        ("dino.koleo_loss_weight=-0.1", "at least 0"),
        ("dino.head_n_prototypes=1", "at least 2"),
        ("dino.head_nlayers=0", "at least 1"),
        ("dino.koleo_queue_size=-1", "at least 0 images"),
        ("dino.koleo_topk=0", "at least 1"),
        ("dino.koleo_topk=2", "1, or set dino.koleo_loss_distributed=true"),
        ("dino.koleo_distributed_loss_group_size=0", "at least 1 image, or null"),
        ("dino.local_loss_weight_schedule.peak=-1", "at least 0"),
        ("gram.loss_weight=-1", "at least 0"),
        ("gram.it_load_ema_teacher=-2", "a step, or -1 for never"),
        ("gram.update_frequency=0", "at least 1 step"),
        ("gram.it_first_update=-1", "at least 0"),
        ("gram.max_updates=-1", "at least 0, or null"),
        ("gram.max_tokens=1", "at least 2 patches, or null"),
        ("anchor.cls_weight=-1", "at least 0"),
        ("anchor.patch_weight=-0.5", "at least 0"),
        ("anchor.max_tokens=0", "at least 1 patch, or null"),
        ("crops.gram_teacher_crops_size=0", "at least 1 px, or null"),
        ("dino.local_loss_weight_schedule.cosine_epochs=-1", "at least 0, or null"),
        ("ibot.head_hidden_dim=0", "at least 1"),
        ("ibot.head_bottleneck_dim=0", "at least 1"),
        ("ibot.mask_sample_probability=1.5", "in 0..1"),
        ("ibot.mask_sample_probability=0", "above 0 (or set ibot.loss_weight=0)"),
        ("ibot.mask_ratio_min_max=[0.5, 0.1]", "two rising numbers in 0..1"),
        ("ibot.mask_ratio_min_max=[0.5, 1.1]", "two rising numbers in 0..1"),
        ("ibot.mask_ratio_min_max=[0, 0]", "above 0 (or set ibot.loss_weight=0)"),
        ("train.batch_size_per_gpu=0", "at least 1 image"),
        ("train.global_batch_size=0", "at least 1 image, or null"),
        ("train.OFFICIAL_EPOCH_LENGTH=0", "at least 1 step, or null"),
        ("train.max_steps=0", "at least 1 step, or null"),
        ("train.seed=-1", "at least 0 and below 2**63"),
        ("train.num_workers=-1", "at least 0"),
        ("train.sinkhorn_queue_size=-1", "at least 0 images"),
        ("train.sinkhorn_queue_size=8", "0, or set train.centering=sinkhorn_knopp"),
        ("train.prototype_init_crops=1", "at least 2"),
        ("train.output_dir=''", "a folder, e.g. outputs/run1"),
        ("student.patch_size=0", "at least 1"),
        ("student.in_chans=0", "at least 1"),
        ("student.depth=0", "at least 1, or null"),
        ("student.embed_dim=0", "at least 1, or null"),
        ("student.drop_path_rate=1", "at least 0 and below 1"),
        ("student.layerscale=-1", "at least 0, or null"),
        ("student.num_register_tokens=-1", "at least 0"),
        ("student.ffn_ratio=0", "above 0, or null"),
        ("student.pos_embed_rope_base=0", "above 0, or null"),
        ("student.pos_embed_rope_min_period=-1", "above 0, or null"),
        ("student.pos_embed_rope_shift_coords=-1", "at least 0, or null"),
        ("student.pos_embed_rope_jitter_coords=0.5", "at least 1, or null"),
        ("student.pos_embed_rope_rescale_coords=0.5", "at least 1, or null"),
        ("student.sync_batchnorm=true", "false: student.arch=vit_large has no BatchNorm"),
        ("student.ffn_layer='swiglu64'", "mlp, swiglu or swiglufused with student.pos_embed_type=learned"),
        ("student.interpolate_offset=-0.1", "at least 0"),
        ("teacher.momentum_teacher=1.1", "in 0..1"),
        ("teacher.final_momentum_teacher=-0.1", "in 0..1"),
        ("teacher.teacher_temp=0", "above 0"),
        ("teacher.warmup_teacher_temp=0", "above 0"),
        ("teacher.warmup_teacher_temp_epochs=-1", "at least 0"),
        ("optim.epochs=0", "at least 1"),
        ("optim.warmup_epochs=101", "in 0..100, the value of optim.epochs"),
        ("optim.base_lr=-1", "at least 0"),
        ("optim.weight_decay_end=-1", "at least 0"),
        ("optim.freeze_last_layer_epochs=-1", "at least 0"),
        ("optim.freeze_backbone_epochs=-0.5", "at least 0"),
        ("optim.unfreeze_ramp_epochs=-0.5", "at least 0"),
        ("optim.backbone_lr_multiplier=-0.5", "at least 0"),
        ("optim.head_lr_multiplier=-0.5", "at least 0"),
        ("lora.rank=-1", "at least 0"),
        ("lora.alpha=0", "above 0"),
        ("lora.dropout=1", "at least 0 and below 1"),
        ("optim.clip_grad=-1", "at least 0, or null"),
        ("optim.schedule_trunc_extra=-0.1", "at least 0"),
        ("optim.dino_head_wd_multiplier=-1", "at least 0"),
        ("optim.layerwise_decay=0", "above 0 and at most 1"),
        ("optim.adamw_beta2=1", "at least 0 and below 1"),
        ("optim.sgd_momentum=1", "at least 0 and below 1"),
        ("optim.gradient_accumulation_steps=0", "at least 1"),
        ("crops.global_crops_scale=[0, 1]", "two rising numbers above 0 and up to 1"),
        ("crops.local_crops_scale=[0.5, 0.2]", "two rising numbers above 0 and up to 1"),
        ("crops.local_crops_number=-1", "at least 0"),
        ("crops.global_crops_size=0", "at least 1 px"),
        ("augmentation.horizontal_flip_probability=1.1", "in 0..1"),
        ("augmentation.brightness=-1", "at least 0"),
        ("augmentation.hue=0.6", "in 0..0.5"),
        ("augmentation.blur_probability=[0, 0, 2]", "three numbers in 0..1"),
        ("augmentation.blur_sigma=[0, 1]", "two rising numbers above 0 px"),
        ("augmentation.mean=[0, 0, 0]", "given together with augmentation.std"),
        ("data.max_image_pixels=0", "at least 1, or null"),
        ("checkpointing.period=0", "at least 1 step"),
        ("checkpointing.max_to_keep=1", "at least 2, or null to keep all"),
        ("checkpointing.keep_every=0", "at least 1 step, or null"),
        ("checkpointing.period_minutes=0", "above 0, or null"),
        ("evaluation.eval_period_iterations=-1", "at least 0 steps, or null"),
        ("evaluation.stop_patience=0", "at least 1 evaluation"),
        ("evaluation.stop_margin=-1", "at least 0"),
        ("guard_rails.window_steps=0", "at least 1"),
        ("guard_rails.patience_steps=0", "at least 1"),
        ("guard_rails.patience_evaluations=0", "at least 1"),
        ("guard_rails.max_blank_pct=101", "in 0..100"),
        ("guard_rails.min_overlap_pct=-1", "in 0..100"),
        ("guard_rails.max_copies_pct=-1", "in 0..100"),
        ("guard_rails.max_drop_points=-1", "at least 0"),
        ("guard_rails.min_feature_std_share=1.5", "in 0..1"),
        ("guard_rails.min_target_information_share=-0.1", "in 0..1"),
        ("guard_rails.min_teacher_momentum=2", "in 0..1"),
        ("guard_rails.min_rank_share=2", "in 0..1"),
        ("evaluation.knn.nb_knn=[]", "a list of numbers of at least 1, such as [10, 20]"),
        ("evaluation.knn.nb_knn=[0]", "a list of numbers of at least 1, such as [10, 20]"),
        ("evaluation.knn.temperature=0", "above 0"),
        ("evaluation.knn.batch_size=0", "at least 1 image"),
        ("evaluation.knn.image_size_px=0", "at least 1 px, or null"),
        ("evaluation.knn.resize_ratio=0.9", "at least 1"),
        ("logging.period_steps=0", "at least 1 step"),
        ("logging.wandb_project=''", "a project name"),
    ],
)
def test_value_out_of_range(override, must_be):
    key, _, _ = override.partition("=")
    with pytest.raises(ConfigError) as caught:
        load_config(None, [override])
    text = str(caught.value)
    assert text.startswith(f"{key}=") and text.endswith(f": must be {must_be}")


@pytest.mark.parametrize(
    ("override", "must_be"),
    [
        ("student.depth=3", "null: student.arch=resnet50 is no ViT"),
        ("student.ffn_ratio=2", "null: student.arch=resnet50 is no ViT"),
        ("student.num_register_tokens=4", "0: student.arch=resnet50 has no tokens"),
    ],
)
def test_keys_of_vits_are_refused_for_resnets(override, must_be):
    with pytest.raises(ConfigError) as caught:
        load_config(None, ["student.arch=resnet50", "ibot.loss_weight=0", override])
    key, _, value = override.partition("=")
    assert str(caught.value) == f"{key}={float(value) if 'ratio' in key else value}: must be {must_be}"


@pytest.mark.parametrize(
    "overrides",
    [
        ["ibot.loss_weight=0", "ibot.mask_sample_probability=0"],
        ["dino.koleo_topk=2", "dino.koleo_loss_distributed=true"],
        ["student.arch=resnet101", "ibot.loss_weight=0", "student.sync_batchnorm=true", "student.pos_embed_type=rope"],
        ["student.pos_embed_type=rope", "student.pos_embed_rope_jitter_coords=1"],
        ["student.qkv_bias=false", "student.mask_k_bias=true"],
        ["ibot.loss_weight=0", "ibot.mask_ratio_min_max=[0, 0]"],
        ["optim.clip_grad=0"],
        ["student.layerscale=0"],
        ["evaluation.eval_period_iterations=0"],
        ["evaluation.eval_period_iterations=null"],
        ["optim.warmup_epochs=100"],
        ["checkpointing.max_to_keep=null"],
        ["compute_precision.device=cuda:3"],
        ["augmentation.mean=[0.1, 0.2, 0.3]", "augmentation.std=[1, 1, 1]"],
        ["student.arch=vit_tiny", "student.embed_dim=32", "student.depth=2", "student.num_heads=2"],
    ],
)
def test_edges_of_ranges_are_allowed(overrides):
    load_config(None, overrides)


def test_named_sizes_are_those_of_the_models():
    import torch

    from dinov2.configs.student_section import ARCH_BLOCKS, ARCH_WIDTH_AND_HEADS, RESNET_ARCHS
    from dinov2.models import RESNETS, SIZES, build_model

    assert RESNET_ARCHS == tuple(RESNETS)
    assert set(ARCH_WIDTH_AND_HEADS) == set(SIZES)
    for arch, (width, heads) in ARCH_WIDTH_AND_HEADS.items():
        with torch.device("meta"):
            model = build_model(arch, patch_size=16, img_size=32)
        assert (model.embed_dim, model.num_heads, model.depth) == (width, heads, ARCH_BLOCKS[arch])
    assert set(ARCH_BLOCKS) == {*SIZES, *RESNETS}
    with torch.device("meta"):
        assert all(build_model(arch).depth == ARCH_BLOCKS[arch] for arch in RESNETS)
