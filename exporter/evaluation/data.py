"""Labelled images in a fixed order: class folders, a flat folder with a list, or WebDataset shards.

All three become one index of (name, label, file, offset, bytes), so that every rank takes its part of the same list, each
image counts once, and an interrupted run knows what is left. That is why shards are read with the standard library's tarfile and
not with the `webdataset` package, which streams: it does not know how many images there are before it has read them, splits whole
shards over ranks (so fewer shards than GPUs starve some), and cannot skip to where a run stopped.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from stm.errors import ConfigError

from .shards import read_shard

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff")
MAX_IMAGE_BYTES = 1 << 28
_LIST = "val.txt"
_WNID = re.compile(r"n\d{8}")
_ACCEPTED = (
    "accepted: class folders with images; a folder of images with a list NAME LABEL (--labels FILE, or val.txt in it); "
    "WebDataset shards (.tar) with .cls or .json beside each image, or with --labels"
)


@dataclass(frozen=True)
class Sample:
    """An image file, or a part of a tar file."""

    name: str
    label: int
    path: Path
    offset: int
    size: int

    def read(self) -> bytes:
        """Raises:
        ConfigError: it cannot be read, or is not as long as it was.
        """
        if self.size > MAX_IMAGE_BYTES:
            raise ConfigError(f"{self.size} bytes; at most {MAX_IMAGE_BYTES} are read")
        try:
            with open(self.path, "rb") as file:
                file.seek(self.offset)
                data = file.read(self.size)
        except OSError as error:
            raise ConfigError(error.strerror or str(error)) from None
        if len(data) != self.size:
            raise ConfigError(f"{len(data)} bytes, expected {self.size}")
        return data


@dataclass(frozen=True)
class ImageSet:
    """Samples in order.

    Args:
        kind: "folders", "list" or "shards".
        classes: folder names or list's class names by class index, None where labels were numbers.
        notes: what a reader of the result should know about the labels.
    """

    kind: str
    samples: tuple[Sample, ...]
    classes: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()

    def identity(self) -> dict[str, Any]:
        """The same for the same names, labels and sizes, wherever they lie; contents are not read."""
        digest = hashlib.sha256()
        for sample in self.samples:
            digest.update(f"{sample.name}\0{sample.label}\0{sample.size}\n".encode("utf-8", "surrogateescape"))
        return {"kind": self.kind, "images": len(self.samples), "sha256": digest.hexdigest()}

    def limited(self, count: int | None) -> ImageSet:
        """`count` images evenly spread over the list, so over the classes."""
        total = len(self.samples)
        if count is None or count >= total:
            return self
        chosen = tuple(self.samples[i * total // count] for i in range(count))
        return replace(self, samples=chosen, notes=(*self.notes, f"{count} of {total} images, evenly spread"))


def open_images(
    paths: Sequence[str | os.PathLike[str]],
    num_classes: int,
    *,
    labels: str | os.PathLike[str] | None = None,
    class_order: str | os.PathLike[str] | None = None,
    class_names: Sequence[str] | None = None,
    limit: int | None = None,
) -> ImageSet:
    """Index the data.

    Args:
        paths: one folder, or .tar files.
        labels: list of NAME LABEL for a flat folder or shards without labels.
        class_order: file with one folder (or class) name a line, in the order of the class index.
        class_names: the model's, used where folders are named so.

    Raises:
        ConfigError: nothing there, an unknown layout, or labels that do not fit the model; names both values.
    """
    places = [Path(path) for path in paths]
    order = _read_order(Path(class_order), num_classes) if class_order is not None else None
    if missing := [place for place in places if not place.exists()]:
        raise ConfigError(f"no data {missing[0]}; {_ACCEPTED}")
    if all(place.is_file() for place in places) and places:
        found = _shards(places, num_classes, labels, order)
    elif len(places) != 1:
        raise ConfigError(f"data is {', '.join(map(str, places))}; give one folder, or .tar files. {_ACCEPTED}")
    else:
        found = _folder(places[0], num_classes, labels, order, class_names)
    if not found.samples:
        raise ConfigError(f"{places[0]} has no images; {_ACCEPTED}")
    repeated = [name for name, count in Counter(sample.name for sample in found.samples).items() if count > 1]
    if repeated:
        raise ConfigError(f"{repeated[0]} is there more than once; each image counts once, so names must differ")
    return found.limited(limit)


def _folder(
    root: Path, num_classes: int, labels: str | os.PathLike[str] | None, order: tuple[str, ...] | None, class_names: Sequence[str] | None
) -> ImageSet:
    entries = sorted((entry for entry in root.iterdir() if not entry.name.startswith(".")), key=lambda entry: entry.name)
    shards = [entry for entry in entries if entry.is_file() and _is_tar(entry)]
    images = [entry for entry in entries if entry.is_file() and entry.suffix.lower() in IMAGE_SUFFIXES]
    folders = [entry for entry in entries if entry.is_dir()]
    kinds = [name for name, found in (("shards", shards), ("images", images), ("folders", folders)) if found]
    if len(kinds) > 1:
        raise ConfigError(f"{root} has {' and '.join(kinds)} side by side; which are the data? {_ACCEPTED}")
    if shards:
        return _shards(shards, num_classes, labels, order)
    if folders:
        if labels is not None:
            raise ConfigError(f"{root} has class folders and --labels {labels} was given; give one source of labels")
        return _class_folders(root, folders, num_classes, order, class_names)
    if images:
        listed = Path(labels) if labels is not None else root / _LIST
        if not listed.is_file():
            raise ConfigError(f"{root} has {len(images)} images without class folders and no list {listed}; {_ACCEPTED}")
        table, classes = _read_labels(listed, num_classes, order)
        samples = [_sample(root, path, _label(table, path.name, listed)) for path in images]
        _all_used(table, [sample.name for sample in samples], listed, root)
        return ImageSet("list", tuple(samples), classes)
    raise ConfigError(f"{root} has no images; {_ACCEPTED}")


def _sample(root: Path, path: Path, label: int) -> Sample:
    return Sample(path.relative_to(root).as_posix(), label, path, 0, path.stat().st_size)


# --- class folders ---------------------------------------------------------------------------------------------------------


def _class_folders(root: Path, folders: list[Path], num_classes: int, order: tuple[str, ...] | None, class_names: Sequence[str] | None) -> ImageSet:
    index, note = _folder_labels(root, [folder.name for folder in folders], num_classes, order, class_names)
    samples: list[Sample] = []
    empty: list[str] = []
    for folder in folders:
        before = len(samples)
        for place, below, files in os.walk(folder, followlinks=True):
            below.sort()
            wanted = sorted(name for name in files if Path(name).suffix.lower() in IMAGE_SUFFIXES and not name.startswith("."))
            samples += [_sample(root, Path(place) / name, index[folder.name]) for name in wanted]
        if len(samples) == before:
            empty.append(folder.name)
    notes = [note] + ([f"{len(empty)} class folders without images ({', '.join(empty[:3])}, ..)"] if empty else [])
    by_index = {label: name for name, label in index.items()}
    classes = tuple(by_index[i] for i in range(num_classes)) if len(index) == num_classes else order
    return ImageSet("folders", tuple(samples), classes, tuple(notes))


def _folder_labels(
    root: Path, names: list[str], num_classes: int, order: tuple[str, ...] | None, class_names: Sequence[str] | None
) -> tuple[dict[str, int], str]:
    """Folder -> class index, and how it was found."""
    if order is not None:
        places = {name: index for index, name in enumerate(order)}
        if unknown := [name for name in names if name not in places]:
            raise ConfigError(f"{root} has a class folder {unknown[0]!r} that the class order does not name ({len(unknown)} such)")
        return {name: places[name] for name in names}, "class index: place in the class order given"
    if len(names) != num_classes:
        nested = next((name for name in ("val", "validation", "test") if name in names), None)
        hint = f"; is it {root / nested}?" if nested else "; for a part of the classes give --class-order FILE, all names in order"
        raise ConfigError(f"{root} has {len(names)} class folders, the model has {num_classes} classes{hint}")
    if all(re.fullmatch(r"[0-9]+", name) for name in names):
        index = {name: int(name) for name in names}
        if set(index.values()) != set(range(num_classes)):
            raise ConfigError(
                f"{root}: class folders are numbered {min(index.values())}..{max(index.values())}, class indices are 0..{num_classes - 1}; "
                "rename them, or give --class-order FILE"
            )
        return index, "class index: the folder's number"
    if class_names is not None and len(set(class_names)) == len(class_names) and set(names) == set(class_names):
        return {name: list(class_names).index(name) for name in names}, "class index: the model's class of the folder's name"
    synsets = all(_WNID.fullmatch(name) for name in names)
    note = "class index: place of the folder among its sorted names" + (" (synsets: ImageNet's order)" if synsets else "")
    return {name: place for place, name in enumerate(sorted(names))}, note


def _read_order(path: Path, num_classes: int) -> tuple[str, ...]:
    """First word of each line (LOC_synset_mapping.txt has more); a tab or the whole line where a name has spaces and no synset."""
    names = []
    for line in _lines(path):
        first = line.split()[0]
        names.append(first if _WNID.fullmatch(first) else line.split("\t")[0].strip())
    if len(names) != num_classes or len(set(names)) != len(names):
        raise ConfigError(f"{path} names {len(set(names))} different classes in {len(names)} lines, the model has {num_classes} classes")
    return tuple(names)


# --- lists of labels -------------------------------------------------------------------------------------------------------


def _lines(path: Path) -> list[str]:
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from None


def _stem(name: str) -> str:
    base = name.replace("\\", "/").rsplit("/", 1)[-1]
    return base.rsplit(".", 1)[0] if base.lower().endswith(IMAGE_SUFFIXES) else base


def _read_labels(path: str | os.PathLike[str], num_classes: int, order: tuple[str, ...] | None) -> tuple[dict[str, int], tuple[str, ...] | None]:
    """Stem of the file name -> class index, and the names of the classes if labels are names.

    Lines are `NAME LABEL` or `NAME,LABEL..` (Kaggle's LOC_val_solution.csv: the first word after the comma). LABEL is a class
    index from 0, or a name (a synset): then its place in the class order, or among the list's sorted names if these are all.
    """
    path = Path(path)
    rows: dict[str, str] = {}
    for number, line in enumerate(_lines(path), 1):
        name, rest = line.split(",", 1) if "," in line else (line.rsplit(None, 1) if len(line.split()) > 1 else (line, ""))
        if not rest.strip():
            raise ConfigError(
                f"{path}, line {number}: {line[:40]!r} is not NAME LABEL. (The ImageNet devkit's ground truth has ILSVRC ids, which are not "
                "class indices: make a list with synsets)"
            )
        label = rest.split()[0].strip("\"'")
        if number == 1 and (name.lower(), label.lower()) == ("imageid", "predictionstring"):
            continue
        if _stem(name.strip()) in rows:
            raise ConfigError(f"{path}, line {number}: {name.strip()!r} is there twice")
        rows[_stem(name.strip())] = label
    distinct = set(rows.values())
    if all(re.fullmatch(r"[0-9]+", label) for label in distinct):
        numbers = {name: int(label) for name, label in rows.items()}
        low, high = min(numbers.values(), default=0), max(numbers.values(), default=0)
        if high >= num_classes:
            one_based = " (they seem to start at 1: subtract 1)" if (low, high) == (1, num_classes) else ""
            raise ConfigError(f"{path}: labels go from {low} to {high}, class indices are 0..{num_classes - 1}{one_based}")
        return numbers, None
    if order is None:
        if len(distinct) != num_classes:
            raise ConfigError(f"{path} names {len(distinct)} classes, the model has {num_classes}; give --class-order FILE, all names in order")
        order = tuple(sorted(distinct))
    places = {name: index for index, name in enumerate(order)}
    if unknown := sorted(distinct - set(places)):
        raise ConfigError(f"{path}: class {unknown[0]!r} is not in the class order ({len(unknown)} such)")
    return {name: places[label] for name, label in rows.items()}, order


def _label(table: Mapping[str, int], name: str, where: str | os.PathLike[str]) -> int:
    if _stem(name) not in table:
        raise ConfigError(f"image {name} has no line in {where}")
    return table[_stem(name)]


def _all_used(table: Mapping[str, int], names: Sequence[str], where: str | os.PathLike[str], data: object) -> None:
    absent = set(table) - {_stem(name) for name in names}
    if absent:
        raise ConfigError(f"{where} names {len(absent)} images that are not in {data} ({min(absent)}, ..); is the data complete?")


# --- shards ----------------------------------------------------------------------------------------------------------------


def _is_tar(path: Path) -> bool:
    return path.name.lower().endswith((".tar", ".tar.gz", ".tgz"))


def _shards(paths: Sequence[Path], num_classes: int, labels: str | os.PathLike[str] | None, order: tuple[str, ...] | None) -> ImageSet:
    if strange := [path for path in paths if not _is_tar(path)]:
        raise ConfigError(f"{strange[0]} is a file and not a .tar; {_ACCEPTED}")
    table, classes = _read_labels(labels, num_classes, order) if labels is not None else (None, None)
    samples = list(_shard_samples(sorted(paths, key=lambda path: (path.name, str(path))), table, labels))
    if bad := next((sample for sample in samples if not 0 <= sample.label < num_classes), None):
        raise ConfigError(f"{bad.name}: label {bad.label}, class indices are 0..{num_classes - 1}; do labels start at 1, or is it another model?")
    if table is not None and labels is not None:
        _all_used(table, [sample.name for sample in samples], labels, "the shards")
    return ImageSet("shards", tuple(samples), classes)


def _shard_samples(paths: Sequence[Path], table: Mapping[str, int] | None, labels: str | os.PathLike[str] | None) -> Iterator[Sample]:
    for path in paths:
        for entry in read_shard(path, IMAGE_SUFFIXES, read_labels=table is None):
            label = entry.label if table is None else _label(table, entry.name, labels or "")
            if label is None:
                raise ConfigError(f'{path}: {entry.name} has no label; put KEY.cls (a number) or KEY.json (with "label") beside it, or give --labels')
            yield Sample(f"{path.name}/{entry.name}", label, path, entry.offset, entry.size)
