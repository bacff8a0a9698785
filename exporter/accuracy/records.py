"""What was measured, on disk: one file a method, budget and variant, written whole when it is done, so that a run can stop anywhere."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import ArtefactError
from ..evaluation.records import _differences
from ..files import written_aside
from .results import Run

SCHEMA = 1
RUN_FILE = "run.json"
RECORDS = "records"


class Records:
    """The folder of one run: `run.json` says which model, images and precision; `records/*.json` are the figures.

    Raises:
        ArtefactError: the folder holds another run (names both values), or a damaged file.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def begin(self, identity: Mapping[str, Any], about: Mapping[str, Any]) -> dict[str, Any]:
        """Write `run.json`, or check that it is of the same model, images and precision.

        Args:
            identity: what all records have in common.
            about: what a reader should know besides; the last call's stays, but names of earlier calls go before its own.

        Returns:
            `about` as it stands now.
        """
        merged = dict(about)
        path = self.folder / RUN_FILE
        wanted: dict[str, Any] = json.loads(json.dumps(identity))
        if path.exists():
            head = self.head()
            if changed := list(_differences(head["identity"], wanted)):
                raise ArtefactError(
                    f"{self.folder} holds a run of something else: {'; '.join(changed[:4])}. Give another -o, or the same arguments to go on"
                )
            for key in ("methods", "budgets"):
                merged[key] = list(dict.fromkeys([*head.get(key, []), *about.get(key, [])]))
            merged.setdefault("impossible", head.get("impossible", []))
        elif (self.folder / RECORDS).exists():
            raise ArtefactError(f"{self.folder} has records and no {RUN_FILE}; give another -o")
        self._write(path, {"schema": SCHEMA, "kind": "accuracy-run", "identity": wanted, **merged})
        return merged

    def left(self) -> list[list[str]]:
        """Keys that earlier calls did not come to."""
        found: list[list[str]] = self.head().get("left_keys", []) if (self.folder / RUN_FILE).exists() else []
        return found

    def head(self) -> dict[str, Any]:
        path = self.folder / RUN_FILE
        found = _read(path)
        if (found.get("schema"), found.get("kind")) != (SCHEMA, "accuracy-run") or not isinstance(found.get("identity"), dict):
            raise ArtefactError(f"{path} is not of this version's `stm bench accuracy`; give another folder, or measure again")
        return found

    def path(self, *key: str) -> Path:
        name = "--".join(re.sub(r"[^A-Za-z0-9.]+", "-", part).strip("-") for part in key)
        return self.folder / RECORDS / f"{name}.json"

    def get(self, identity: Mapping[str, Any], *key: str) -> dict[str, Any] | None:
        """The record under this key, None if there is none or it is of another plan or schedule (then it is measured again)."""
        path = self.path(*key)
        if not path.exists():
            return None
        found = _read(path)
        if found.get("key") != list(key):
            raise ArtefactError(f"{path} is of {found.get('key')}, not of {list(key)}; remove it")
        return found if found.get("identity") == json.loads(json.dumps(identity)) else None

    def put(self, record: Mapping[str, Any], identity: Mapping[str, Any], *key: str) -> None:
        self._write(self.path(*key), {"key": list(key), "identity": identity, **record})

    def all(self, kind: str) -> list[dict[str, Any]]:
        return [record for path in sorted((self.folder / RECORDS).glob("*.json")) if (record := _read(path)).get("kind") == kind]

    def _write(self, path: Path, data: Mapping[str, Any]) -> None:
        with written_aside(path) as aside:
            aside.write_text(json.dumps(data, allow_nan=False) + "\n", encoding="utf-8")


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ArtefactError(f"cannot read {path} ({str(error)[:100]}); remove it, and it is measured again") from None
    if not isinstance(found, dict):
        raise ArtefactError(f"{path} is not one of ours; remove it, and it is measured again")
    return found


def read_run(folder: str | Path) -> Run:
    """What lies in the folder of an earlier `stm bench accuracy -o`.

    Raises:
        ArtefactError: no such folder, or not one of ours.
    """
    records = Records(Path(folder))
    if not (records.folder / RUN_FILE).is_file():
        raise ArtefactError(f"{folder} is not a folder of `stm bench accuracy -o`: it has no {RUN_FILE}")
    head, measured = records.head(), records.all("accuracy")
    try:
        return Run.of(head, measured, records.all("latency"))
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise ArtefactError(f"{folder} has a damaged record ({type(error).__name__}: {error}); remove it, and it is measured again") from None
