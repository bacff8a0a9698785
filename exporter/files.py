"""Files are written aside and renamed when whole, so that nothing is lost on failure and no partial file is left."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from .errors import ExportError


def check_writable(path: Path) -> None:
    """Find out before hours of work whether `path` can be written; creates nothing.

    Raises:
        ExportError: it is a folder, or its folder cannot be made or written.
    """
    if path.is_dir():
        raise ExportError(f"cannot write {path}: it is a folder")
    folder = path.parent
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir():
        raise ExportError(f"cannot write {path}: {folder} is not a folder")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ExportError(f"cannot write {path}: no permission to write in {folder}")


@contextlib.contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Yield a path beside `path`; rename it onto `path` at the end, remove it on any error (Ctrl-C too).

    Raises:
        ExportError: the folder cannot be written.
    """
    with Staging(path.parent) as staging:
        yield staging.path(path)


class Staging:
    """Several files that appear together: written in a hidden folder beside them, renamed when the block ends well (the one
    asked for first, the main one, last), removed when it does not.

    Raises:
        ExportError: a file cannot be written or renamed.
    """

    def __init__(self, folder: Path) -> None:
        self._target = folder
        self._files: list[tuple[Path, Path]] = []
        self._scratch: Path | None = None

    def __enter__(self) -> Staging:
        try:
            self._target.mkdir(parents=True, exist_ok=True)
            self._scratch = Path(tempfile.mkdtemp(prefix=".stm-", suffix=".part", dir=self._target))
        except OSError as error:
            raise ExportError(f"cannot write in {self._target}: {error.strerror or error}") from None
        return self

    def path(self, final: Path) -> Path:
        """Where to write what will be `final`."""
        assert self._scratch is not None
        aside = self._scratch / f"{len(self._files)}-{final.name}"
        self._files.append((aside, final))
        return aside

    def keep_as(self, final: Path, other: Path) -> None:
        """Rename what was written for `final` to `other` now, and forget it."""
        aside = next(a for a, f in self._files if f == final)
        os.replace(aside, other)
        self._files = [(a, f) for a, f in self._files if f != final]

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        assert self._scratch is not None
        try:
            if kind is None:
                for aside, final in reversed(self._files):
                    if aside.exists():
                        final.parent.mkdir(parents=True, exist_ok=True)
                        os.replace(aside, final)
        except OSError as problem:
            raise ExportError(f"cannot write {problem.filename2 or problem.filename}: {problem.strerror or problem}") from None
        finally:
            shutil.rmtree(self._scratch, ignore_errors=True)
        if isinstance(error, OSError):
            raise ExportError(f"cannot write in {self._target}: {error.strerror or error}") from None
