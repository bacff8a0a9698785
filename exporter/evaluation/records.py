"""Per-image predictions on disk: appended batch by batch, read back after an interruption, refused if something else made them."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from ..errors import ArtefactError, ExportError
from ..files import written_aside

SCHEMA = 1
RUN_FILE = "run.json"


@dataclass(frozen=True)
class Prediction:
    """Best classes of one image by subject, best first; `unreadable` says why there are none."""

    index: int
    image: str
    label: int
    classes: Mapping[str, Sequence[int]] = field(default_factory=dict)
    unreadable: str | None = None

    def to_dict(self) -> dict[str, Any]:
        head = {"index": self.index, "image": self.image, "label": self.label}
        return head | ({"unreadable": self.unreadable} if self.unreadable is not None else {"top": self.classes})


class Records:
    """The files of one run in its folder.

    `run.json` says what is evaluated. Rank r appends to `predictions-r.jsonl` (a line an image) and `timing-r.jsonl` (a line a
    batch). A batch is one write, synced to disk; a last line that a crash cut off is dropped, so its images are done again.

    Raises:
        ArtefactError: the folder holds another run (names both values), a damaged file, or a run that is going on.
        ExportError: it cannot be written.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], rank: int = 0) -> None:
        self.folder, self.rank = folder, rank
        self.identity: dict[str, Any] = json.loads(json.dumps(identity))
        self._files: list[Any] = []

    def begin(self) -> None:
        """Write `run.json`, or check the one that is there."""
        path = self.folder / RUN_FILE
        if not path.exists() and not (self.folder / "predictions-0.jsonl").exists():
            with written_aside(path) as aside:
                aside.write_text(json.dumps({"schema": SCHEMA, "kind": "eval-run", **self.identity}, indent=1) + "\n", encoding="utf-8")
        self.check()

    def check(self) -> None:
        """Refuse a folder of another run."""
        path = self.folder / RUN_FILE
        if self.rank and not path.exists():
            raise ArtefactError(f"rank {self.rank} does not see {path}, which rank 0 wrote; the output folder must be one that all machines share")
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ArtefactError(f"{self.folder} has predictions, but {path} cannot be read ({str(error)[:100]}); give another -o") from None
        if not isinstance(found, dict) or (found.pop("schema", None), found.pop("kind", None)) != (SCHEMA, "eval-run"):
            raise ArtefactError(f"{path} is not of this version's `stm eval`; give another -o")
        if changed := list(_differences(found, self.identity)):
            raise ArtefactError(
                f"{self.folder} holds a run of something else: {'; '.join(changed[:4])}. Give another -o, or the same arguments to go on"
            )

    def predictions(self) -> dict[int, Prediction]:
        """All images done so far, whichever rank did them.

        Raises:
            ArtefactError: a damaged line, or two different answers for one image.
        """
        done: dict[int, Prediction] = {}
        names = set(self.identity["subjects"])
        for path in sorted(self.folder.glob("predictions-*.jsonl")):
            for number, row in self._rows(path):
                try:
                    made = Prediction(row["index"], row["image"], row["label"], row.get("top", {}), row.get("unreadable"))
                    whole = made.unreadable is not None or set(made.classes) == names
                except (KeyError, TypeError, AttributeError):
                    whole = False
                if not whole or type(made.index) is not int or type(made.label) is not int:
                    raise ArtefactError(f"{path}, line {number} is damaged; remove the file, and its images are done again")
                before = done.get(made.index)
                if before is None or before.unreadable is not None:
                    done[made.index] = made
                elif made.unreadable is None and made != before:
                    raise ArtefactError(f"{path}, line {number}: image {made.image} was done twice with different answers; remove the file")
        return done

    def timings(self) -> list[dict[str, Any]]:
        """Rows {"images", "warm_up", "seconds": {subject: s}}."""
        return [row for path in sorted(self.folder.glob("timing-*.jsonl")) for _, row in self._rows(path)]

    def _rows(self, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
        for number, line in enumerate(_whole(path).splitlines(), 1):
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if not isinstance(row, dict):
                raise ArtefactError(f"{path}, line {number} is damaged; remove the file, and its images are done again")
            yield number, row

    def __enter__(self) -> Records:
        """Open this rank's files for appending, and keep other runs out."""
        for kind in ("predictions", "timing"):
            path = self.folder / f"{kind}-{self.rank}.jsonl"
            try:
                file = open(path, "ab", buffering=0)
            except OSError as error:
                raise ExportError(f"cannot write {path}: {error.strerror or error}") from None
            self._files.append(file)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self.__exit__(None, None, None)
                raise ArtefactError(f"another `stm eval` is writing {path}; wait for it, or give another -o") from None
            except OSError:  # a file system without locks
                pass
            file.truncate(len(_whole(path)))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        while self._files:
            self._files.pop().close()

    def append(self, batch: Sequence[Prediction], timing: Mapping[str, Any] | None) -> None:
        """Predictions of a batch and how long it took."""
        rows: list[list[Any]] = [[made.to_dict() for made in batch], [timing] if timing else []]
        for file, lines in zip(self._files, rows, strict=True):
            text = "".join(json.dumps(row) + "\n" for row in lines).encode()
            try:
                while text:
                    text = text[file.write(text) :]
                os.fsync(file.fileno())
            except OSError as error:
                raise ExportError(f"cannot write {file.name}: {error.strerror or error}") from None


def _whole(path: Path) -> bytes:
    """The lines that were written to their end."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ArtefactError(f"cannot read {path}: {error.strerror or error}") from None
    return data[: data.rfind(b"\n") + 1]


def _differences(then: Any, now: Any, where: str = "") -> Iterator[str]:
    if isinstance(then, dict) and isinstance(now, dict) and then.keys() == now.keys():
        for key in now:
            yield from _differences(then[key], now[key], f"{where}.{key}" if where else str(key))
    elif then != now:

        def short(value: Any) -> str:
            return ", ".join(value) if isinstance(value, dict) else str(value)[:90]

        yield f"{where} was {short(then)}, is {short(now)}"
