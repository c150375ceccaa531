"""Options that the evaluation programs share."""

import pytest

from dinov2.eval.options import get_args_parser, parse_options

KEYS = ["train.seed=3", "defaults=dinov3"]


@pytest.mark.parametrize(
    "argv",
    [
        [*KEYS, "--cs", "0.1", "1", "--train-dataset", "ImageFolder:root=a=b"],
        ["--train-dataset", "ImageFolder:root=a=b", "--cs", "0.1", "1", *KEYS],
        ["--cs", "0.1", "1", KEYS[0], "--train-dataset", "ImageFolder:root=a=b", KEYS[1]],
    ],
)
def test_keys_stand_anywhere(argv):
    parser = get_args_parser("any.py", description="any")
    parser.add_argument("--cs", nargs="+", type=float)
    args = parse_options(parser, argv)
    assert (args.opts, args.cs, args.train_dataset) == (KEYS, [0.1, 1.0], "ImageFolder:root=a=b")
