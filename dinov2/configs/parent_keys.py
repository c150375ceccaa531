"""Keys of the parents' config files that this project names differently, ignores or refuses, as one table.

A parent's key that stands in our schema needs no entry. All others fall into three classes: honoured (translated to a
key of ours), without effect (accepted; a note is logged if it asks for something else than what happens here), refused
(with the reason, unless it asks for what happens here). What changes only training is refused when training is built;
what changes the backbone itself is refused at once, because its features would be wrong in an evaluation too.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

MODULES = [f"{net}.{part}" for net in ("student", "teacher") for part in ("backbone", "dino_head", "ibot_head")]
PER_MODULE = {  # our key in compute_precision: DINOv2's key for each module
    "sharding_strategy": "sharding_strategy",
    "param_dtype": "mixed_precision.param_dtype",
    "reduce_dtype": "mixed_precision.reduce_dtype",
}


@dataclass(frozen=True)
class OneOrMore:
    """Stands for the type of a value that may be one `kind` or a list of them."""

    kind: Any


@dataclass(frozen=True)
class ParentKey:
    """What becomes of one key of a parent's file."""

    kind: Literal["honoured", "without effect", "refused", "refused at once"]
    reason: str
    annotation: Any  # type that the value must have; Any: not checked
    is_quiet: Callable[[Any], bool] = lambda value: True  # tells whether a value asks for nothing but what happens here


def per_module_keys(suffix: str) -> list[str]:
    """Return DINOv2's keys for each module; the student's backbone, which decides, comes first."""
    return [f"compute_precision.{module}.{suffix}" for module in MODULES]


def _honoured(annotation: Any, reason: str) -> ParentKey:
    return ParentKey("honoured", reason, annotation)


def _ignored(annotation: Any, reason: str, *quiet: Any) -> ParentKey:
    return ParentKey("without effect", reason, annotation, lambda value: not quiet or value in quiet)


def _refused(annotation: Any, reason: str, *quiet: Any) -> ParentKey:
    return ParentKey("refused", reason, annotation, lambda value: value in quiet)


def _refused_at_once(annotation: Any, reason: str, *quiet: Any) -> ParentKey:
    return ParentKey("refused at once", reason, annotation, lambda value: value in quiet)


_PRECISION: Mapping[str, ParentKey] = {
    "MODEL.META_ARCHITECTURE": _honoured(
        Literal["SSLMetaArch", "MultiDistillationMetaArch"], "marks a DINOv3 file; becomes defaults=dinov3"
    ),
    "MODEL.DEVICE": _ignored(str, "compute_precision.device decides", "cuda"),
    "MODEL.DTYPE": _ignored(str, "weights are kept in float32", "float32"),
    **{
        key: _honoured(Any, f"becomes compute_precision.{target}, one value for all modules")
        for target, suffix in PER_MODULE.items()
        for key in per_module_keys(suffix)
    },
    **{
        key: _ignored(str, "buffers keep their own type", "fp32")
        for key in per_module_keys("mixed_precision.buffer_dtype")
    },
}

_LOSSES: Mapping[str, ParentKey] = {
    **{
        f"{head}.head_norm_last_layer": _ignored(bool, f"{head}.head_weight_norm decides", False)
        for head in ("dino", "ibot")
    },
    "dino.force_weight_norm": _ignored(bool, "dino.head_weight_norm and ibot.head_weight_norm decide", False),
    "dino.koleo_distributed_replicas": _refused(
        int, "neighbours are looked for once; set dino.koleo_distributed_loss_group_size instead", 0
    ),
    "dino.koleo_distributed_loss_group_data": _ignored(bool, "neighbouring ranks always form a group", True),
    "ibot.mask_random_circular_shift": _refused(bool, "masks are not shifted around the image", False),
    "ibot.force_masking_even_with_zero_weight": _ignored(
        bool, "images are masked where ibot.loss_weight is above 0", False
    ),
    "coding_rate_loss.use_cls_loss": _refused(bool, "there is no coding rate loss", False),
    "coding_rate_loss.use_masked_patches_loss": _refused(bool, "there is no coding rate loss", False),
    **{
        f"coding_rate_loss.{name}": _ignored(float, "belongs to the coding rate loss")
        for name in ("cls_loss_weight", "masked_patches_loss_weight", "epsilon")
    },
}

_TRAIN: Mapping[str, ParentKey] = {
    "train.saveckp_freq": _honoured(int, "epochs between saves; becomes checkpointing.period in steps"),
    "train.cache_dataset": _ignored(bool, "file lists are read anew at each start", True, False),
    "train.cudagraphs": _ignored(bool, "train.compile_mode decides", False),
    "train.monitor_gradient_norm": _ignored(bool, "gradient norms are always recorded", False),
    "train.fsdp_reshard_after_forward": _honoured(
        bool, "becomes compute_precision.sharding_strategy: FULL_SHARD for true, SHARD_GRAD_OP for false"
    ),
    "train.sharded_eval_checkpoint": _ignored(bool, "the teacher of an evaluation is one file", False),
    "train.data_config": _ignored(Any, "train.dataset_path names the images", None),
    "train.chunk_schedule": _ignored(Any, "DINOv3 does not read it either", [], None),
    "train.use_teacher_head": _ignored(bool, "DINOv3 does not read it either", True),
    "train.learn_from_teacher_tokens": _ignored(bool, "DINOv3 does not read it either", False),
    "train.cell_augmentation": _refused(bool, "set the keys of augmentation instead", False),
    "train.cell_augmentation_type": _ignored(str, "belongs to train.cell_augmentation"),
    "optim.lr": _honoured(float, "with DINOv3's defaults it becomes optim.base_lr"),
    "optim.multi_tensor_optim": _ignored(bool, "optimisers always take many tensors at once", True),
    "optim.dump_fsdp_weights_path": _ignored(str, "DINOv3 does not read it either", ""),
    "teacher.in_chans": _ignored(int, "the teacher has the student's channels"),
    "distillation.enabled": _refused(bool, "training from a fixed teacher is not available yet", False),
    "distillation.full_cfg_path": _ignored(str, "belongs to distillation.enabled"),
    "distillation.checkpoint_path": _ignored(str, "belongs to distillation.enabled"),
    "multidistillation.enabled": _refused(bool, "training several students at once is not available yet", False),
    "multidistillation.global_batch_size": _ignored(int, "belongs to multidistillation.enabled"),
    "multidistillation.students": _ignored(Any, "belongs to multidistillation.enabled"),
    "hrft.enabled": _refused(bool, "name the weights by MODEL.WEIGHTS and the sizes by crops instead", False),
    "hrft.checkpoint_path": _ignored(str, "belongs to hrft.enabled"),
    "evaluation.low_freq_every": _ignored(int, "evaluations are those of evaluation.knn"),
    "evaluation.config_files.high_freq": _ignored(str, "evaluations are those of evaluation.knn"),
    "evaluation.config_files.low_freq": _ignored(str, "evaluations are those of evaluation.knn"),
}

_STUDENT: Mapping[str, ParentKey] = {
    "student.n_storage_tokens": _honoured(int, "becomes student.num_register_tokens"),
    "student.resume_from_teacher_chkpt": _honoured(str, "becomes MODEL.WEIGHTS"),
    "student.block_chunks": _ignored(
        int, "blocks are one flat list, and weights saved in chunks are read all the same", 0
    ),
    "student.fp8_enabled": _ignored(bool, "compute_precision.param_dtype decides", False),
    "student.fp8_filter": _ignored(str, "belongs to student.fp8_enabled"),
    "student.sparse24_default": _ignored(bool, "weights are not pruned", False),
    "student.sparse24_ranges": _ignored(list, "weights are not pruned", []),
    "student.sparse24_filter": _ignored(list, "belongs to student.sparse24_ranges"),
    "student.pos_embed_grid_size": _ignored(int, "belongs to learned positions, whose grid follows from the crop size"),
    "student.fourier_encoding_dim": _ignored(int, "belongs to student.fourier_embeddings"),
    "student.drop_path_shape": _refused(str, "set student.drop_path_uniform instead", "uniform"),
    "student.patch_drop": _refused(float, "all patches are used", 0.0),
    "student.init_std_cls": _refused(float, "the class token starts from 0.02", 0.02),
    "student.init_std_reg": _refused(float, "the register tokens start from 0.02", 0.02),
    "student.rescale_weights_by_layer_id": _refused(bool, "first weights do not depend on the depth", False),
    "student.channel_adaptive": _refused_at_once(
        bool, "channels are trained together; set student.in_chans to their number", False
    ),
    "student.pos_embed_rope_gamma": _refused_at_once(float, "angles are not scaled", 1.0),
    **{
        f"student.{name}": _refused_at_once(bool, "the backbone has no such part", False)
        for name in (
            "sin_cos_embeddings",
            "fourier_embeddings",
            "multiple_pos_embeddings",
            "cls_pos_embedding",
            "reg_pos_embedding",
            "mask_attention",
            "mask_register_attention",
            "pos_embed_rope_init_multi_frequencies",
        )
    },
}

_CROPS: Mapping[str, ParentKey] = {
    "crops.horizontal_flips": _honoured(bool, "becomes augmentation.horizontal_flip_probability, 0.5 or 0"),
    "crops.rgb_mean": _honoured(tuple[float, ...] | None, "becomes augmentation.mean"),
    "crops.rgb_std": _honoured(tuple[float, ...] | None, "becomes augmentation.std"),
    "crops.global_local_crop_pairs_ratios": _ignored(
        OneOrMore(float), "belongs to lists of crops.global_crops_size and crops.local_crops_size"
    ),
    "crops.localcrops_subset_of_globalcrops": _refused(bool, "local crops come from the whole image", False),
    "crops.share_color_jitter": _refused(bool, "each crop has its own colours", False),
    "crops.teacher_to_student_resolution_scale": _refused(float, "teacher and student see the same crops", 1.0),
}

PARENT_KEYS: Mapping[str, ParentKey] = {**_PRECISION, **_LOSSES, **_TRAIN, **_STUDENT, **_CROPS}

# Values of the parents for keys of ours, and what they mean here.
PARENT_VALUES: Mapping[str, Mapping[Any, Any]] = {
    "student.pos_embed_type": {"ropenew": "rope"},
    "gram.ckpt": {"ignore": None},  # stands in a released file where a path is to be given
    "checkpointing.keep_every": {99999999999999999: None},
}

# Keys that may be null in a file with `schedules`, which replace them.
REPLACED_BY_SCHEDULES = (
    *(f"optim.{name}" for name in ("lr", "min_lr", "warmup_epochs", "weight_decay", "weight_decay_end")),
    *(f"optim.{name}" for name in ("freeze_last_layer_epochs", "schedule_trunc_extra")),
    *(f"teacher.{name}" for name in ("momentum_teacher", "final_momentum_teacher", "teacher_temp")),
    *(f"teacher.{name}" for name in ("warmup_teacher_temp", "warmup_teacher_temp_epochs")),
)


@cache
def parent_sections() -> set[str]:
    """Return the dotted names of the sections that the parents' keys stand in."""
    return {key[:end] for key in PARENT_KEYS for end in range(len(key)) if key[end] == "."}
