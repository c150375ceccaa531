"""Every setting does something: building, three training steps and an online k-NN read each key."""

from support.config_reads import recording
from support.training import TINY_RUN

from dinov2 import distributed
from dinov2.configs import load_config
from dinov2.configs.tree import leaves
from dinov2.train.train import do_train

# Read by the program before or outside `do_train`, which gets what they say as arguments.
READ_BY_THE_PROGRAM = {
    "compute_precision.device",  # `distributed.init`
    "defaults",  # `load_config`
    "train.output_dir",  # handed to `do_train`
}
KNN = [f"evaluation.knn.{part}_dataset_path=Digits:split=VAL" for part in ("train", "val")]
SCHEDULES = [
    "schedules.lr={start: 0, peak: 1e-3, end: 1e-6, warmup_epochs: 0}",
    "schedules.weight_decay={start: 0.04, peak: 0.04, end: 0.2, warmup_epochs: 0}",
    "schedules.momentum={start: 0.99, peak: 0.99, end: 1, warmup_epochs: 0}",
    "schedules.teacher_temp={start: 0.04, peak: 0.04, end: 0.07, warmup_epochs: 0}",
]
NO_VIT = [f"student.{key}=null" for key in ("embed_dim", "depth", "num_heads")]
WEIGHTS = "student.pretrained_weights=FOLDER/adamw/eval/start/teacher_checkpoint.pth"
RUNS = {
    "adamw": [
        *KNN,
        "evaluation.at_start=true",
        "evaluation.eval_period_iterations=3",
        "guard_rails.window_steps=1",
        "ibot.separate_head=true",
        "dino.prototype_init=kmeans",
        "train.prototype_init_crops=20",
        "train.max_steps=3",
    ],
    "sgd_fp16": [
        WEIGHTS,
        "evaluation.eval_period_iterations=1",
        "lora.rank=2",
        "gram.use_loss=true",
        "gram.ckpt=start",
        "gram.loss_weight_schedule={start: 1, peak: 1, end: 1, warmup_epochs: 0}",
        "anchor.cls_weight=1",
        "optim.optimizer=sgd",
        "train.max_steps=1",
        "compute_precision.param_dtype=fp16",
    ],
    "dinov3": [
        *SCHEDULES,
        "defaults=dinov3",
        "train.max_steps=1",
        "dino.koleo_loss_distributed=true",
        "dino.reweight_dino_local_loss=true",
    ],
    "resnet": ["student.arch=resnet18", *NO_VIT, "ibot.loss_weight=0", "train.max_steps=1"],
}


def test_every_key_is_read(tmp_path):
    read = set(READ_BY_THE_PROGRAM)
    for name, options in RUNS.items():
        folder = tmp_path / name
        folder.mkdir()
        options = [option.replace("FOLDER", str(tmp_path)) for option in options]
        cfg, keys = recording(load_config(None, [*TINY_RUN, *options, f"train.output_dir={folder}"]))
        env = distributed.init("cpu")
        try:
            do_train(cfg, env, output_dir=folder)
        finally:
            distributed.shutdown()
        read |= keys
    unread = sorted(leaves().keys() - read)
    assert unread == []
