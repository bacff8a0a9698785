"""The evaluation's data: official preprocessing to the last bit, class folders, lists, shards, and what is refused."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from exporter.evaluation.data import IMAGE_SUFFIXES, open_images
from exporter.evaluation.preprocessing import Preprocessing, UnreadableImageError, decode
from exporter.evaluation.shards import read_shard
from exporter.images import resized
from stm import ConfigError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def picture(width: int, height: int) -> Image.Image:
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([(x * 7 + y * 3) % 256, (x * y) % 256, (x + 2 * y) % 256], -1).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


# --- preprocessing ---------------------------------------------------------------------------------------------------------


def recipe(image: Image.Image, size: int) -> np.ndarray:
    """Resize(int(size / 0.875), 3), CenterCrop(size), ToTensor(), Normalize(..), written down again."""
    short, (w, h) = int(size / 0.875), image.size
    image = image.resize((short, int(short * h / w)) if w <= h else (int(short * w / h), short), Image.Resampling.BICUBIC)
    top, left = round((image.height - size) / 2.0), round((image.width - size) / 2.0)
    x = np.asarray(image, dtype=np.float32)[top : top + size, left : left + size].transpose(2, 0, 1) / np.float32(255)
    return (x - np.float32(MEAN)[:, None, None]) / np.float32(STD)[:, None, None]


@pytest.mark.parametrize("size", [224, 384])
@pytest.mark.parametrize(("width", "height"), [(500, 332), (332, 500), (90, 701), (256, 256), (300, 300), (1, 7), (1023, 100)])
def test_preprocessing_is_the_published_recipe(width: int, height: int, size: int) -> None:
    image = picture(width, height)
    assert np.array_equal(Preprocessing((size, size), MEAN, STD)(image), recipe(image, size))


@pytest.mark.parametrize(
    ("width", "height", "pixels", "mean", "std"),
    [  # computed by torchvision 0.29.2 with Pillow 13.0; 385.5 -> 385 in the first two
        (500, 332, [-1.72403, -0.40756, 2.48314], 0.221008, 1.132788),
        (332, 500, [1.3413, -0.86274, -0.53211], 0.209857, 1.134077),
        (90, 701, [1.32417, -0.39006, -0.1661], 0.301434, 1.293352),
        (256, 256, [0.62206, -1.96569, 1.76854], 0.219897, 1.297226),
        (300, 300, [1.11867, 1.51821, -0.54954], 0.215521, 1.160029),
    ],
)
def test_preprocessing_has_torchvisions_numbers(width: int, height: int, pixels: list[float], mean: float, std: float) -> None:
    made = Preprocessing((224, 224), MEAN, STD)(picture(width, height))
    assert (made.shape, made.dtype) == ((3, 224, 224), np.float32)
    step = 1 / 255 / min(STD)  # another Pillow may round a pixel the other way
    assert [made[0, 0, 0], made[1, 100, 37], made[2, 223, 223]] == pytest.approx(pixels, abs=1.01 * step)
    assert (made.mean(dtype=np.float64), made.std(dtype=np.float64)) == pytest.approx((mean, std), abs=2e-3)


def test_other_shapes_and_crop_ratios() -> None:
    wide = Preprocessing((192, 256), MEAN, STD)
    for width, height in ((400, 300), (300, 400), (1000, 50)):
        w, h = resized((width, height), (192, 256))
        assert w >= 292
        assert h >= 219
        assert w == 292 or h == 219
        assert wide(picture(width, height)).shape == (3, 192, 256)
    assert resized((500, 400), (224, 224), 1.0) == (280, 224)
    assert Preprocessing((224, 224), MEAN, STD, 1.0)(picture(300, 300).convert("L")).shape == (3, 224, 224)
    for ratio in (0.0, 1.1, float("nan")):
        with pytest.raises(ConfigError, match="crop ratio"):
            Preprocessing((224, 224), MEAN, STD, ratio)


@pytest.mark.parametrize("mode", ["L", "CMYK", "RGBA", "P", "1", "I;16"])
def test_every_kind_of_picture_becomes_rgb(mode: str) -> None:
    image = picture(30, 20).convert(mode) if mode != "I;16" else Image.fromarray(np.zeros((20, 30), np.uint16))
    assert decode(encoded(image, "TIFF" if mode == "CMYK" else "PNG")).mode == "RGB"


@pytest.mark.parametrize("data", [b"", b"no image", encoded(picture(60, 60))[:900], encoded(picture(60, 60), "JPEG")[:-700]])
def test_damaged_images(data: bytes) -> None:
    with pytest.raises(UnreadableImageError):
        decode(data)


# --- class folders ---------------------------------------------------------------------------------------------------------


def folders(root: Path, names: list[str], each: int = 2) -> Path:
    for name in names:
        (root / name).mkdir(parents=True)
        for index in range(each):
            (root / name / f"{index}.png").write_bytes(encoded(picture(20 + index, 20)))
    return root


def labels(root: Path, num_classes: int = 3, **options: object) -> dict[str, int]:
    return {sample.name: sample.label for sample in open_images([root], num_classes, **options).samples}  # type: ignore[arg-type]


def test_synsets_sort_to_class_indices(tmp_path: Path) -> None:
    found = open_images([folders(tmp_path, ["n02000000", "n01440764", "n15075141"])], 3)
    assert [(s.name, s.label) for s in found.samples] == [
        ("n01440764/0.png", 0),
        ("n01440764/1.png", 0),
        ("n02000000/0.png", 1),
        ("n02000000/1.png", 1),
        ("n15075141/0.png", 2),
        ("n15075141/1.png", 2),
    ]
    assert "synsets" in found.notes[0]
    assert decode(found.samples[3].read()).size == (21, 20)


def test_numbers_are_numbers_and_not_text(tmp_path: Path) -> None:
    found = labels(folders(tmp_path, [str(i) for i in range(12)], 1), 12)
    assert found["10/0.png"] == 10  # sorted as text it would be 2
    assert found["2/0.png"] == 2


def test_folders_named_as_the_models_classes(tmp_path: Path) -> None:
    root = folders(tmp_path, ["ant", "bee", "cat"], 1)
    assert labels(root, class_names=["cat", "ant", "bee"]) == {"cat/0.png": 0, "ant/0.png": 1, "bee/0.png": 2}
    assert labels(root, class_names=["cat", "ant", "dog"]) == {"ant/0.png": 0, "bee/0.png": 1, "cat/0.png": 2}


def test_class_order_and_a_part_of_the_classes(tmp_path: Path) -> None:
    root = folders(tmp_path / "data", ["n00000003", "n00000001"], 1)
    order = tmp_path / "order.txt"
    order.write_text("n00000003 a thing, another\nn00000002 x\n\nn00000001\n")
    assert labels(root, class_order=order) == {"n00000003/0.png": 0, "n00000001/0.png": 2}
    with pytest.raises(ConfigError, match=r"3 different classes in 3 lines, the model has 4"):
        labels(root, 4, class_order=order)
    order.write_text("great white shark\ncat\ndog\n")
    with pytest.raises(ConfigError, match="'n00000001' that the class order does not name"):
        labels(root, class_order=order)
    assert labels(folders(tmp_path / "named", ["great white shark"], 1), class_order=order) == {"great white shark/0.png": 0}


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["a", "b"], ["2 class folders", "3 classes", "--class-order"]),
        (["train", "val"], ["2 class folders", "is it", "val?"]),
        (["1", "2", "3"], ["numbered 1..3", "0..2"]),
        ([], ["no images", "accepted: class folders"]),
    ],
)
def test_folders_that_do_not_fit(tmp_path: Path, names: list[str], words: list[str]) -> None:
    tmp_path.mkdir(exist_ok=True)
    with pytest.raises(ConfigError) as error:
        labels(folders(tmp_path, names))
    for word in words:
        assert word in str(error.value)


def test_nested_hidden_and_empty_folders(tmp_path: Path) -> None:
    root = folders(tmp_path, ["a", "b", "c", ".git"], 1)
    (root / "a" / "deep").mkdir()
    (root / "a" / "deep" / "x.JPEG").write_bytes(encoded(picture(9, 9), "JPEG"))
    (root / "a" / "notes.txt").write_text("no image")
    (root / "b" / "0.png").unlink()
    found = open_images([root], 3)
    assert [sample.name for sample in found.samples] == ["a/0.png", "a/deep/x.JPEG", "c/0.png"]
    assert any("1 class folders without images (b" in note for note in found.notes)


def test_limit_takes_images_of_all_classes(tmp_path: Path) -> None:
    root = folders(tmp_path, ["a", "b", "c"], 5)
    found = open_images([root], 3, limit=6)
    assert [sample.label for sample in found.samples] == [0, 0, 1, 1, 2, 2]
    assert "6 of 15" in found.notes[-1]
    assert open_images([root], 3, limit=99).samples == open_images([root], 3).samples
    assert found.identity() != open_images([root], 3).identity()


# --- flat folder and list --------------------------------------------------------------------------------------------------


@pytest.fixture
def flat(tmp_path: Path) -> Path:
    root = tmp_path / "flat"
    root.mkdir()
    for index in range(3):
        (root / f"val_{index}.JPEG").write_bytes(encoded(picture(10, 10), "JPEG"))
    return root


@pytest.mark.parametrize(
    "text",
    [
        "val_0.JPEG 2\nval_1.JPEG 0\nval_2.JPEG 1\n",
        "val_2 1\nval_1\t0\n\nsome/where/val_0.JPEG 2",
        "val_0.JPEG n09\nval_1.JPEG n01\nval_2.JPEG n05\n",
        "ImageId,PredictionString\nval_2,n05 85 1 499 272\nval_1,n01 1 2 3 4 n01 5 6 7 8\nval_0,n09 1 2 3 4",
        "\ufeffval_0.JPEG,2\nval_1.JPEG,0\nval_2.JPEG,1",
    ],
    ids=["indices", "stems", "synsets", "kaggle", "csv"],
)
def test_lists(flat: Path, tmp_path: Path, text: str) -> None:
    wanted = {"val_0.JPEG": 2, "val_1.JPEG": 0, "val_2.JPEG": 1}
    (tmp_path / "list").write_text(text, encoding="utf-8")
    assert labels(flat, labels=tmp_path / "list") == wanted
    (flat / "val.txt").write_text(text, encoding="utf-8")
    assert labels(flat) == wanted


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("490\n361\n171\n", ["line 1", "not NAME LABEL", "ILSVRC ids"]),
        ("val_0 1\nval_1 2\nval_2 3\n", ["from 1 to 3", "0..2", "start at 1"]),
        ("val_0 1\nval_1 2\n", ["val_2.JPEG has no line"]),
        ("val_0 1\nval_1 2\nval_2 0\nval_3 0\n", ["names 1 images that are not in", "val_3"]),
        ("val_0 1\nval_0.JPEG 2\n", ["line 2", "twice"]),
        ("val_0 a\nval_1 b\nval_2 b\n", ["names 2 classes, the model has 3", "--class-order"]),
        ("", ["has no line"]),
    ],
)
def test_lists_that_do_not_fit(flat: Path, text: str, words: list[str]) -> None:
    (flat / "val.txt").write_text(text)
    with pytest.raises(ConfigError) as error:
        labels(flat)
    for word in words:
        assert word in str(error.value)


def test_a_flat_folder_without_a_list_and_mixtures(flat: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"3 images without class folders and no list .*val.txt"):
        labels(flat)
    (flat / "a").mkdir()
    with pytest.raises(ConfigError, match="images and folders side by side"):
        labels(flat)
    with pytest.raises(ConfigError, match="no data"):
        labels(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="give one folder"):
        open_images([flat, tmp_path], 3)
    with pytest.raises(ConfigError, match="file and not a"):
        open_images([flat / "val_0.JPEG"], 3)
    with pytest.raises(ConfigError, match="one source of labels"):
        labels(folders(tmp_path / "f", ["a", "b", "c"]), labels=flat / "val.txt")


# --- shards ----------------------------------------------------------------------------------------------------------------


def shard(path: Path, files: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return path


PNG = encoded(picture(12, 9))


def test_shards(tmp_path: Path) -> None:
    long = "d" * 120
    shard(
        tmp_path / "b.tar",
        {
            "./x/0.jpg": encoded(picture(8, 8), "JPEG"),
            "./x/0.cls": b"2\n",
            "README": b"hello",
            f"{long}/k.WEBP": PNG,
            f"{long}/k.json": b'{"label": 1}',
        },
    )
    shard(tmp_path / "a.tar", {"0.cls": b"0", "0.left.png": PNG, "0.txt": b"a cat", "1.txt": b"no image", "1.cls": b"9", ".hidden.png": PNG})
    found = open_images([tmp_path], 3)
    assert [(s.name, s.label) for s in found.samples] == [("a.tar/0.left.png", 0), ("b.tar/./x/0.jpg", 2), (f"b.tar/{long}/k.WEBP", 1)]
    assert [decode(s.read()).size for s in found.samples] == [(12, 9), (8, 8), (12, 9)]
    assert open_images([tmp_path / "b.tar", tmp_path / "a.tar"], 3).samples == found.samples


def test_the_plain_imagenet_tar_with_a_list(tmp_path: Path) -> None:
    path = shard(tmp_path / "ILSVRC2012_img_val.tar", {f"val_{i}.JPEG": encoded(picture(8, 8), "JPEG") for i in range(3)})
    with pytest.raises(ConfigError, match=r"val_0.JPEG has no label; put KEY.cls"):
        open_images([path], 3)
    (tmp_path / "list").write_text("val_0 1\nval_1 2\nval_2 0\n")
    assert [sample.label for sample in open_images([path], 3, labels=tmp_path / "list").samples] == [1, 2, 0]


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"0.png": PNG, "0.cls": b"cat"}, ["0.cls cannot be read", "class index"]),
        ({"0.png": PNG, "0.cls": b"1.5"}, ["not a whole number"]),
        ({"0.png": PNG, "0.json": b'{"label": "cat"}'}, ["0.json", "not a whole number"]),
        ({"0.png": PNG, "0.json": b'{"caption": "cat"}'}, ["has no label"]),
        ({"0.png": PNG, "0.cls": b"3"}, ["label 3", "0..2", "start at 1"]),
        ({"0.png": PNG, "0.cls": b"-1"}, ["label -1"]),
        ({"0.png": PNG, "0.jpg": PNG, "0.cls": b"1"}, ["two images"]),
        ({"0.png": PNG, "0.PNG": PNG, "0.cls": b"1"}, ["there twice"]),
        ({"0.png": PNG, "0.cls": b"1", "1.txt": b"", "0.txt": b"", "0.webp": PNG}, ["0.webp has no label"]),
        ({"0.cls": b"1"}, ["has no images"]),
    ],
)
def test_shards_that_do_not_fit(tmp_path: Path, files: dict[str, bytes], words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        open_images([shard(tmp_path / "x.tar", files)], 3)
    for word in words:
        assert word in str(error.value)


def damage(name: str) -> Callable[[Path], Path]:
    def truncated(path: Path) -> Path:
        path.write_bytes(shard(path, {"0.cls": b"1", "0.png": PNG}).read_bytes()[: 512 * 3 + 100])
        return path

    def compressed(path: Path) -> Path:
        return shard(path.with_suffix(".tar.gz"), {"0.cls": b"1", "0.png": PNG}, "w:gz")

    def text(path: Path) -> Path:
        path.write_text("no tar " * 200)
        return path

    return {"truncated": truncated, "compressed": compressed, "text": text}[name]


@pytest.mark.parametrize(("how", "word"), [("truncated", "unexpected end|truncated"), ("compressed", "gunzip"), ("text", "cannot read")])
def test_damaged_shards(tmp_path: Path, how: str, word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        open_images([damage(how)(tmp_path / "x.tar")], 3)


def test_a_name_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    files = {"0.png": PNG, "0.cls": b"1"}
    first, second = shard(tmp_path / "x.tar", files), shard(tmp_path / "b" / "x.tar", files)
    with pytest.raises(ConfigError, match="more than once"):
        open_images([first, second], 3)


def test_links_in_a_shard_are_passed_over(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        link = tarfile.TarInfo("0.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    assert list(read_shard(tmp_path / "x.tar", IMAGE_SUFFIXES)) == []


def test_identity_follows_names_labels_and_sizes_only(tmp_path: Path) -> None:
    one, two = folders(tmp_path / "one", ["a", "b", "c"]), folders(tmp_path / "two", ["a", "b", "c"])
    before = open_images([one], 3).identity()
    assert open_images([two], 3).identity() == before
    assert json.loads(json.dumps(before)) == before
    (two / "a" / "0.png").write_bytes(PNG + b"x")
    assert open_images([two], 3).identity() != before
