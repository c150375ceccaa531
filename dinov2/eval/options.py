"""Options that the evaluation programs share. Most stand for a config key, which they overrule."""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from dinov2.configs import Config, load_config
from dinov2.configs.evaluation_sections import KnnConfig
from dinov2.configs.run_sections import TrainConfig
from dinov2.errors import ConfigError
from dinov2.eval.pooling import parse_pool

_STANDS_FOR = {  # option: config key
    "train_dataset": "evaluation.knn.train_dataset_path",
    "val_dataset": "evaluation.knn.val_dataset_path",
    "batch_size": "evaluation.knn.batch_size",
    "num_workers": "train.num_workers",
    "nb_knn": "evaluation.knn.nb_knn",
    "temperature": "evaluation.knn.temperature",
}
_KEY_AND_VALUE = re.compile(r"(defaults|[A-Za-z_]\w*(\.\w+)+)=")


def get_args_parser(prog: str, *, description: str) -> argparse.ArgumentParser:
    """Describe the options of every program that fits and scores; a program adds its own."""
    parser = get_backbone_parser(prog, description=description)
    parser.add_argument(
        "--train-dataset", metavar="S", help=f"labelled images to learn from; stands for {_STANDS_FOR['train_dataset']}"
    )
    parser.add_argument(
        "--val-dataset", metavar="S", help=f"labelled images to report on; stands for {_STANDS_FOR['val_dataset']}"
    )
    return parser


def get_backbone_parser(prog: str, *, description: str) -> argparse.ArgumentParser:
    """Describe the options of every program that computes features."""
    parser = argparse.ArgumentParser(prog=prog, description=description)
    parser.add_argument("--config-file", "--config", metavar="F", help="YAML file over the defaults; default: none")
    parser.add_argument(
        "--pretrained-weights",
        metavar="W",
        help="file, folder, checkpoint or name (timm:..., hf:...) of the backbone; must be given",
    )
    parser.add_argument(
        "--checkpoint-key",
        default="teacher",
        metavar="KEY",
        help="network to take from a file that holds several, teacher or student; default: teacher",
    )
    parser.add_argument("--output-dir", default=".", metavar="D", help="folder for results and logs; default: here")
    parser.add_argument(
        "--batch-size",
        metavar="N",
        help=f"images that a process reads at a time, which changes no result; stands for {_STANDS_FOR['batch_size']} "
        f"(default {KnnConfig.batch_size})",
    )
    parser.add_argument(
        "--num-workers",
        metavar="N",
        help=f"loader processes of one process; stands for {_STANDS_FOR['num_workers']} "
        f"(default {TrainConfig.num_workers})",
    )
    parser.add_argument(
        "opts", nargs="*", metavar="key=value", help="config keys over the file, e.g. student.arch=vit_small"
    )
    return parser


def add_features_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the features that are kept."""
    parser.add_argument(
        "--features-dir", metavar="D", help="folder where features are kept and found; default: OUTPUT_DIR/features"
    )
    parser.add_argument(
        "--features-dtype",
        choices=("fp32", "bf16", "fp16"),
        default="fp32",
        help="numbers of the features that are kept; default: fp32",
    )


def add_pool_option(parser: argparse.ArgumentParser) -> None:
    """Add the option of programs that take one vector an image."""
    parser.add_argument(
        "--pool",
        default="cls",
        metavar="POOL",
        help="features of an image: cls, mean, cls+mean, lastN, lastN+mean; default: cls",
    )


def add_set_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of programs that take one set of images, with one vector each."""
    parser.add_argument(
        "--dataset", dest="val_dataset", metavar="S", help="images with their metadata; the same as --val-dataset"
    )
    add_pool_option(parser)


def refuse_other_sets(args: argparse.Namespace, *, may_train: bool = False) -> None:
    """Refuse sets that have no effect: a program of one set takes neither a test set nor, mostly, a training set."""
    if args.test_dataset:
        raise ConfigError("--test-dataset has no effect here: nothing is chosen that a test set would have to confirm")
    if args.train_dataset != args.val_dataset and not may_train:
        raise ConfigError("--train-dataset has no effect here: the images of --dataset are compared with each other")


def pool_of(cfg: Config, args: argparse.Namespace) -> str:
    """Return the pool of features that --pool names.

    Raises:
        ConfigError: there is no such pool, or it has more than one vector an image.
    """
    if parse_pool(args.pool).has_patches:
        raise ConfigError("--pool patches has many vectors an image; choose one such as cls or cls+mean")
    return args.pool


def add_knn_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of k-NN."""
    parser.add_argument(
        "--nb_knn",
        "--nb-knn",
        nargs="+",
        metavar="K",
        help=f"numbers of neighbours; stands for {_STANDS_FOR['nb_knn']} "
        f"(default {' '.join(map(str, KnnConfig.nb_knn))})",
    )
    parser.add_argument(
        "--temperature",
        metavar="T",
        help=f"of the votes, no unit, > 0; stands for {_STANDS_FOR['temperature']} (default {KnnConfig.temperature})",
    )
    parser.add_argument(
        "--n-per-class-list",
        nargs="+",
        type=int,
        default=[-1],
        metavar="N",
        help="training images used of each class, several one after the other; -1: all of them; default: -1",
    )
    parser.add_argument(
        "--n-tries",
        type=int,
        default=1,
        metavar="N",
        help="random choices of those images, whose scores are averaged; default: 1",
    )


def parse_options(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse a command line; its key=value arguments may stand anywhere, also behind an option that takes a list.

    Args:
        parser: with the positional argument `opts`.
        argv: None: that of the process.
    """
    given = sys.argv[1:] if argv is None else argv
    keys = [text for text in given if _KEY_AND_VALUE.match(text)]
    return parser.parse_intermixed_args([*keys, *(text for text in given if text not in keys)])


def config_from_options(args: argparse.Namespace) -> Config:
    """Build the config: the file, the `key=value` arguments, then the options that stand for keys.

    Raises:
        ConfigError: a key or value is wrong, or the weights are not given.
    """
    if not args.pretrained_weights:
        raise ConfigError("--pretrained-weights is not given; name the file with the backbone to evaluate")
    overrides = [*args.opts, f"train.output_dir={args.output_dir}"]
    for option, key in _STANDS_FOR.items():
        value = getattr(args, option, None)
        if isinstance(value, list):
            value = f"[{', '.join(value)}]"
        if value is not None:
            overrides.append(f"{key}={value}")
    return load_config(args.config_file, overrides)


def check_few_shot_options(args: argparse.Namespace) -> None:
    """Check the options that stand for no key."""
    if any(n < 1 and n != -1 for n in args.n_per_class_list):
        raise ConfigError(
            f"--n-per-class-list {' '.join(map(str, args.n_per_class_list))}: must be at least 1, or -1 for all"
        )
    if args.n_tries < 1:
        raise ConfigError(f"--n-tries {args.n_tries}: must be at least 1")


def make_output_dir(output_dir: str) -> None:
    """Make the folder of results; for rank 0.

    Raises:
        ConfigError: it cannot be made or written.
    """
    try:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        probe = Path(output_dir) / ".write_test"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"--output-dir {output_dir}: cannot be written ({error.strerror}); choose another") from error
