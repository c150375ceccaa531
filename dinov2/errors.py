"""Errors that a user can cause; each carries one clear sentence and the exit code of the program that meets it."""


class Dinov2Error(Exception):
    """Base of all errors a user can cause; programs print the sentence and exit with `exit_code`."""

    exit_code = 1


class ConfigError(Dinov2Error):
    """A setting, key or command-line argument is wrong."""

    exit_code = 2


class DatasetError(Dinov2Error):
    """Images, labels or folders are missing or cannot be read."""


class CheckpointError(Dinov2Error):
    """Weights or a checkpoint are missing, damaged or do not fit the model."""


class OtherParametersError(CheckpointError):
    """A checkpoint is of a model with other parameters, or of an optimiser that trains others."""


class TrainingError(Dinov2Error):
    """A run cannot go on, for example after repeated non-finite losses."""


class GuardRailError(TrainingError):
    """A guard rail has ended a run; from the same checkpoint, with the same settings, it would do so again."""


class StoppedEarly(KeyboardInterrupt):
    """A signal, which it names, has told a program to stop while there is nothing to save; that is no failure."""
