"""The images that vim-n is trained and judged on: repeatable, balanced, split by what is drawn, and not to be told from one patch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

import stm
from stm.data import CLASS_NAMES, NUM_CLASSES, SPLITS, VARIANTS, DigitPairs, Scene
from stm.data.digit_pairs import LARGE, SMALL, SOURCES, TEST_FORMS

COUNT = 24


@pytest.fixture(scope="module")
def scenes() -> dict[tuple[str, str], Scene]:
    return {(split, variant): DigitPairs(split, variant).scene(torch.arange(COUNT)) for split in SPLITS for variant in VARIANTS}


def both(scenes: dict[tuple[str, str], Scene], variant: str) -> tuple[Tensor, Tensor]:
    return scenes["test", variant].images, scenes["test", variant].labels


def test_an_index_gives_the_same_image_in_any_batch(scenes: dict[tuple[str, str], Scene]) -> None:
    for (split, variant), scene in scenes.items():
        again = DigitPairs(split, variant)
        images, labels = again.batch(torch.tensor([21, 7]))
        assert torch.equal(images, scene.images[[21, 7]])
        assert torch.equal(labels, scene.labels[[21, 7]])
        far = again.batch(torch.tensor([10**12]))[0]
        assert torch.equal(far, again.batch(torch.tensor([10**12, 3]))[0][:1])


def test_the_global_random_state_has_no_part_in_it() -> None:
    torch.manual_seed(1)
    first = DigitPairs("test", "anywhere").batch(torch.arange(2))[0]
    before = torch.random.get_rng_state()
    assert torch.equal(first, DigitPairs("test", "anywhere").batch(torch.arange(2))[0])
    assert torch.equal(before, torch.random.get_rng_state())


def test_known_images() -> None:
    """A change of the generator changes what vim-n was trained on: then train again and set these anew."""
    images, labels = DigitPairs("test", "anywhere").batch(torch.arange(4))
    assert labels.tolist() == KNOWN_LABELS
    means = images.float().mean((1, 2, 3))
    assert torch.allclose(means, torch.tensor(KNOWN_MEANS), atol=0.05)


def test_seeds_splits_variants_and_indices_make_different_images(scenes: dict[tuple[str, str], Scene]) -> None:
    images = [scene.images for scene in scenes.values()] + [DigitPairs("train", "centred", seed=1).batch(torch.arange(COUNT))[0]]
    everything = torch.cat(images).flatten(1)
    assert len({bytes(image) for image in everything.numpy()}) == len(everything)


def test_images_are_what_the_model_takes(scenes: dict[tuple[str, str], Scene]) -> None:
    for scene in scenes.values():
        assert scene.images.shape == (COUNT, 3, 224, 224)
        assert scene.images.dtype == torch.uint8
        spread = scene.images.float().std((1, 2, 3))
        assert spread.min() > 8
        assert 40 < scene.images.float().mean() < 200


@pytest.mark.parametrize("variant", VARIANTS)
def test_classes_are_balanced_and_shuffled(variant: str) -> None:
    pairs = DigitPairs("train", variant)
    labels = pairs.labels(torch.arange(1000)).view(10, 100)
    assert all(torch.equal(block.sort().values, torch.arange(100)) for block in labels)
    assert len({tuple(block.tolist()) for block in labels}) > 5
    assert NUM_CLASSES == len(CLASS_NAMES) == len(set(CLASS_NAMES))
    assert CLASS_NAMES[37] == "large 3, small 7"


def test_splits_share_no_digit_and_no_texture() -> None:
    tensors = load_file(SOURCES)
    test = torch.isin(tensors["forms"], torch.tensor(TEST_FORMS, dtype=torch.uint8))
    assert (int(test.sum()), int((~test).sum())) == (382, 1415)
    assert DigitPairs("train", "centred").num_digits == 1415
    assert DigitPairs("test", "centred").num_digits == 382
    digits = [{bytes(digit.flatten().numpy()) for digit in tensors["digits"][chosen]} for chosen in (test, ~test)]
    assert not digits[0] & digits[1]  # not one equal pair of drawings
    for split in (test, ~test):
        assert tensors["labels"][split].bincount(minlength=10).min() >= 30
    a, b = (tensors[f"textures.{split}"].float() for split in SPLITS)
    for first, second in zip(a, b, strict=True):
        # No part of one is in the other: the best match of a piece of the training square stays far from 1.
        piece = first[60:84, 60:84]
        windows = F.unfold(second[None, None], 24)[0]
        centred = windows - windows.mean(0)
        piece = (piece - piece.mean()).flatten()
        assert (piece @ centred / (centred.norm(dim=0) * piece.norm() + 1e-6)).max() < 0.9


def test_digits_lie_inside_and_apart(scenes: dict[tuple[str, str], Scene]) -> None:
    for (_, variant), scene in scenes.items():
        ink = scene.ink > 0.2
        assert not (ink[:, 0] & ink[:, 1]).any()
        border = torch.ones(224, 224, dtype=torch.bool)
        border[1:-1, 1:-1] = False
        assert not (ink & border).any()
        assert (scene.sizes[:, 0] <= LARGE[1]).all()
        assert (scene.sizes[:, 1] <= SMALL[1]).all()
        assert (scene.sizes[:, 1] >= 0.8 * SMALL[0]).all()  # wide pairs are made smaller
        middle = (scene.centres[..., 1] - 112).abs()
        assert (middle.max() < 60) == (variant == "centred")


def ink_by_patch(scene: Scene) -> Tensor:
    """(images, 2, 196): ink of each digit in each patch."""
    return F.avg_pool2d(scene.ink, 16).flatten(2) * 256


def test_no_patch_decides_the_class(scenes: dict[tuple[str, str], Scene]) -> None:
    """No patch holds ink of both digits; so whoever sees one patch knows at best one of two independent digits: 1 class in 10."""
    for scene in scenes.values():
        ink = (F.max_pool2d(scene.ink, 16) > 0.1).flatten(2)
        assert not (ink[:, 0] & ink[:, 1]).any()


def test_each_digit_is_spread_over_many_patches(scenes: dict[tuple[str, str], Scene]) -> None:
    for scene in scenes.values():
        ink = ink_by_patch(scene)
        share = ink.amax(2) / ink.sum(2)
        assert share[:, 0].max() < 0.35  # of the large digit's ink in its fullest patch
        assert share[:, 1].max() < 0.75
        assert share[:, 1].median() < 0.45
        assert ((ink > 8).sum(2).float().mean(0) > torch.tensor([8.0, 3.5])).all()


def test_the_large_digit_is_the_larger(scenes: dict[tuple[str, str], Scene]) -> None:
    for scene in scenes.values():
        assert (scene.sizes[:, 0] > 1.2 * scene.sizes[:, 1]).all()


def test_a_margin_adds_ground_and_nothing_else(scenes: dict[tuple[str, str], Scene]) -> None:
    images, labels = DigitPairs("test", "anywhere", margin=16).batch(torch.arange(3))
    want, want_labels = both(scenes, "anywhere")
    assert images.shape == (3, 3, 256, 256)
    assert torch.equal(images[..., 16:-16, 16:-16], want[:3])
    assert torch.equal(labels, want_labels[:3])


def test_unknown_split_variant_and_margin_are_errors() -> None:
    for arguments, words in (
        (("training", "centred"), ["training", "train, test"]),
        (("train", "center"), ["center", "anywhere"]),
        (("train", "centred", 0, "cpu", -1), ["-1"]),
    ):
        with pytest.raises(stm.ConfigError) as error:
            DigitPairs(*arguments)
        assert all(word in str(error.value) for word in words)


KNOWN_LABELS = [83, 20, 57, 94]
KNOWN_MEANS = [103.386, 159.986, 124.582, 177.332]
