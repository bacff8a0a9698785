"""Errors of export, build and parity; `exit_code` is the CLI's (DESIGN section 7)."""

from stm.errors import StmError


class ExportError(StmError, RuntimeError):
    """The model could not be exported, or the exported graph breaks a promise."""

    exit_code = 4


class BuildError(StmError, RuntimeError):
    """TensorRT could not build an engine."""

    exit_code = 5


class PluginError(StmError, RuntimeError):
    """The plugin library is missing or did not take a node that is ours."""

    exit_code = 6


class ParityError(StmError, RuntimeError):
    """A runtime computes something else than PyTorch."""

    exit_code = 7


class PerformanceError(StmError, RuntimeError):
    """A performance gate failed."""

    exit_code = 8


class ArtefactError(StmError, RuntimeError):
    """A file does not belong to what it is used with: another hash, GPU, TensorRT or plan."""

    exit_code = 9
