"""The errors a user can meet; each says what is wrong, where, both values and the mend."""

from __future__ import annotations


class StmError(Exception):
    """Root of all errors raised on purpose by this project."""

    exit_code = 2


class ConfigError(StmError, ValueError):
    """A model name or size that does not exist or does not fit."""


class PlanError(StmError, ValueError):
    """A merge plan that is malformed or does not fit the model."""


class ShapeError(StmError, ValueError):
    """A tensor's extent differs from what an operation expects."""


class CheckpointError(StmError, ValueError):
    """A weights file that cannot be read or does not fit the model."""


class MissingDependencyError(StmError, RuntimeError):
    """A package, a GPU, or the network is needed and absent (exit code 3)."""

    exit_code = 3
