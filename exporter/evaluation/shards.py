"""A WebDataset shard's index: where in the tar file each image lies, and its label. Nothing is unpacked."""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from stm.errors import ConfigError

# WebDataset's rule: what is before the first dot of the file name is the sample's key.
_KEY = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)")
_MAX_LABEL_BYTES = 1 << 20


@dataclass(frozen=True)
class Entry:
    """An image of a shard; `name` as in the tar file."""

    name: str
    offset: int
    size: int
    label: int | None


@dataclass
class _Group:
    key: str = ""
    suffixes: set[str] = field(default_factory=set)
    image: tarfile.TarInfo | None = None
    labels: dict[str, tarfile.TarInfo] = field(default_factory=dict)


def read_shard(path: Path, image_suffixes: Sequence[str], read_labels: bool = True) -> Iterator[Entry]:
    """Images of a shard in their order; consecutive files of one key are one sample. Samples without an image are passed over.

    The label is `KEY.cls` (a number as text), else "label" of `KEY.json`.

    Raises:
        ConfigError: compressed, truncated, not a tar file, or a sample with two images or a damaged label.
    """
    try:
        with open(path, "rb") as file:
            if file.read(2) == b"\x1f\x8b":
                raise ConfigError(f"{path} is compressed, so images in it cannot be found without reading all of it: gunzip it first")
            file.seek(0, 2)
            end = file.tell()
            file.seek(0)
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for group in _groups(path, tar, image_suffixes):
                    if group.image is None:
                        continue
                    if group.image.offset_data + group.image.size > end:
                        raise ConfigError(f"{path} is truncated: {group.image.name} ends beyond it")
                    label = _read_label(path, file, group) if read_labels else None
                    yield Entry(group.image.name, group.image.offset_data, group.image.size, label)
    except tarfile.TarError as error:
        raise ConfigError(f"cannot read {path} as a tar file: {error}") from None
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}") from None


def _groups(path: Path, tar: tarfile.TarFile, image_suffixes: Sequence[str]) -> Iterator[_Group]:
    group = _Group()
    for member in tar:
        match = _KEY.fullmatch(member.name)
        if not member.isreg() or member.issparse() or match is None:
            continue
        key, suffix = match.group(1), match.group(2).lower()
        if key != group.key:
            yield group
            group = _Group(key)
        if suffix in group.suffixes:
            raise ConfigError(f"{path}: {member.name} is there twice")
        group.suffixes.add(suffix)
        if "." + suffix.rsplit(".", 1)[-1] in image_suffixes:
            if group.image is not None:
                raise ConfigError(f"{path}: sample {key} has two images, {group.image.name} and {member.name}")
            group.image = member
        elif suffix in ("cls", "json"):
            group.labels[suffix] = member
    yield group


def _read_label(path: Path, file: BinaryIO, group: _Group) -> int | None:
    """`file` is the tar file; its position is put back for tarfile."""
    member = group.labels.get("cls") or group.labels.get("json")
    if member is None:
        return None
    place = file.tell()
    file.seek(member.offset_data)
    text = file.read(min(member.size, _MAX_LABEL_BYTES))
    file.seek(place)
    try:
        value = json.loads(text)
        if member is group.labels.get("json") and isinstance(value, dict):
            value = value.get("label")
        if value is None:
            return None
        if type(value) is not int:
            raise ValueError(f"{value!r:.40} is not a whole number")
        return value
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: the label in {member.name} cannot be read ({str(error)[:80]}); it is a class index") from None
