"""The settings of a run: typed defaults, YAML files and key=value laid over them, checks, and writing them out."""

from dinov2.configs.config import Config, batch_size_per_rank, require_train_dataset, require_trainable
from dinov2.configs.load import load_config
from dinov2.configs.stages import stage_configs
from dinov2.configs.write import config_digest, to_dict, write_config

__all__ = [
    "Config",
    "batch_size_per_rank",
    "config_digest",
    "load_config",
    "require_train_dataset",
    "require_trainable",
    "stage_configs",
    "to_dict",
    "write_config",
]
