"""The model against the published forward pass, transcribed in tests/reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import stm
from tests.reference.vim_reference import vim_reference
from tests.reference.weights import as_arrays, trained_like_

FLOAT64_TOLERANCE = 1e-10
FLOAT32_TOLERANCE = 5e-5  # logits spread over a few units

BASE = {"d_model": 32, "depth": 3, "d_state": 8, "image_size": (64, 64), "num_classes": 10}
ROWS = {
    "base": {},
    "one layer": {"depth": 1},
    "non-square": {"image_size": (48, 80)},  # 15 patches: an odd count
    "tall": {"image_size": (96, 32)},
    "remainder": {"image_size": (50, 71)},  # pixels left over on both sides
    "one patch": {"image_size": (16, 16)},  # class token first of two
    "two patches": {"image_size": (16, 32)},
    "stride 8": {"stride": 8},
    "stride 8, non-square": {"stride": 8, "image_size": (32, 56)},
    "d_state 16": {"d_state": 16},
    "d_state 1": {"d_state": 1},
    "dt_rank rounded up": {"d_model": 40},  # ceil(40 / 16) = 3
    "conv of 3": {"d_conv": 3},
    "expand 1": {"expand": 1},
    "one class": {"num_classes": 1},
}


def small_config(**changes) -> stm.VimConfig:
    return stm.VimConfig(name="small", **{**BASE, **changes})


def images(batch: int, size: tuple[int, int], seed: int = 0) -> torch.Tensor:
    """Float32 values in a float64 tensor, so that both precisions see the same image."""
    values = np.random.default_rng(seed).standard_normal((batch, 3, *size)).astype(np.float32)
    return torch.from_numpy(values).double()


def logits(model: torch.nn.Module, image: torch.Tensor) -> np.ndarray:
    with torch.inference_mode():
        return model(image.to(next(model.parameters()).dtype)).double().numpy()


@pytest.fixture(scope="module")
def vim_t():
    """vim-t as a user makes it, a batch of two, and the reference's logits."""
    model = trained_like_(stm.create_model("vim-t", seed=0), seed=1)
    image = images(2, (224, 224))
    return model, image, vim_reference(as_arrays(model), image.numpy())


def test_vim_t_float32(vim_t):
    model, image, expected = vim_t
    assert np.abs(logits(model, image) - expected).max() <= FLOAT32_TOLERANCE


def test_vim_t_float64(vim_t):
    model, image, expected = vim_t
    wide = stm.create_model("vim-t").to(torch.float64)
    wide.load_state_dict(model.state_dict())
    assert expected.std() > 0.5  # the reference says something
    assert np.abs(logits(wide, image) - expected).max() <= FLOAT64_TOLERANCE


def test_vim_t_fresh_weights():
    """Straight from `create_model`, nothing perturbed: what a user without weights runs."""
    model = stm.create_model("vim-t", seed=3)
    image = images(1, (224, 224))
    expected = vim_reference(as_arrays(model), image.numpy())
    assert np.abs(logits(model, image) - expected).max() <= FLOAT32_TOLERANCE


@pytest.mark.parametrize("changes", ROWS.values(), ids=ROWS.keys())
@pytest.mark.parametrize("cls_only_last", [True, False], ids=["cls_only", "all_tokens"])
def test_small(changes, cls_only_last):
    config = small_config(**changes)
    model = trained_like_(stm.VisionMamba(config, cls_only_last=cls_only_last), seed=2).eval()
    image = images(3, config.image_size)
    expected = vim_reference(as_arrays(model), image.numpy(), stride=config.stride)
    assert np.abs(logits(model, image) - expected).max() <= FLOAT32_TOLERANCE
    assert np.abs(logits(model.to(torch.float64), image) - expected).max() <= FLOAT64_TOLERANCE


@pytest.mark.parametrize(
    ("d_model", "stride", "size"),
    [(192, 8, (224, 224)), (192, 16, (384, 384)), (192, 16, (192, 256)), (384, 16, (224, 224)), (768, 16, (224, 224))],
    ids=["vim-t-stride8", "vim-t at 384", "vim-t at 192x256", "vim-s", "vim-b"],
)
def test_published_widths_one_layer(d_model, stride, size):
    """Every published width, stride and a larger image, cut to one layer to stay quick."""
    config = stm.VimConfig(name="cut", d_model=d_model, depth=1, stride=stride, image_size=size)
    model = trained_like_(stm.VisionMamba(config), seed=4).eval()
    image = images(1, size)
    expected = vim_reference(as_arrays(model), image.numpy(), stride=stride)
    assert np.abs(logits(model, image) - expected).max() <= FLOAT32_TOLERANCE
    assert np.abs(logits(model.to(torch.float64), image) - expected).max() <= FLOAT64_TOLERANCE


def test_cls_only_last_changes_nothing(vim_t):
    model, image, _ = vim_t
    full = stm.create_model("vim-t", cls_only_last=False)
    full.load_state_dict(model.state_dict())
    assert np.abs(logits(model, image) - logits(full, image)).max() <= 1e-5
    wide, wide_full = model_copy(model).double(), full.double()
    assert np.abs(logits(wide, image) - logits(wide_full, image)).max() <= 1e-12


def model_copy(model: torch.nn.Module) -> torch.nn.Module:
    copy = stm.create_model("vim-t")
    copy.load_state_dict(model.state_dict())
    return copy


def test_batch_of_one_equals_its_row():
    config = small_config()
    model = trained_like_(stm.VisionMamba(config), seed=2).eval().double()
    image = images(3, config.image_size)
    rows = np.concatenate([logits(model, image[i : i + 1]) for i in range(3)])
    assert np.abs(logits(model, image) - rows).max() <= 1e-13


def test_repeats_bit_for_bit():
    model = trained_like_(stm.VisionMamba(small_config()), seed=2).eval()
    image = images(2, (64, 64))
    assert np.array_equal(logits(model, image), logits(model, image))


def test_every_parameter_has_a_say():
    model = trained_like_(stm.VisionMamba(small_config()), seed=2).double()
    model(images(1, (64, 64))).square().sum().backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []


def published_shapes(d: int, patches: int, classes: int = 1000, depth: int = 24) -> dict[str, tuple]:
    """Names and shapes of the official state dict."""
    inner, state, rank = 2 * d, 16, -(-d // 16)
    shapes: dict[str, tuple] = {
        "cls_token": (1, 1, d),
        "pos_embed": (1, patches + 1, d),
        "patch_embed.proj.weight": (d, 3, 16, 16),
        "patch_embed.proj.bias": (d,),
        "head.weight": (classes, d),
        "head.bias": (classes,),
        "norm_f.weight": (d,),
    }
    for index in range(depth):
        layer = f"layers.{index}."
        shapes[layer + "norm.weight"] = (d,)
        shapes[layer + "mixer.in_proj.weight"] = (2 * inner, d)
        shapes[layer + "mixer.out_proj.weight"] = (d, inner)
        for suffix, a_log in (("", "A_log"), ("_b", "A_b_log")):
            shapes[layer + f"mixer.{a_log}"] = (inner, state)
            shapes[layer + f"mixer.D{suffix}"] = (inner,)
            shapes[layer + f"mixer.conv1d{suffix}.weight"] = (inner, 1, 4)
            shapes[layer + f"mixer.conv1d{suffix}.bias"] = (inner,)
            shapes[layer + f"mixer.x_proj{suffix}.weight"] = (rank + 2 * state, inner)
            shapes[layer + f"mixer.dt_proj{suffix}.weight"] = (inner, rank)
            shapes[layer + f"mixer.dt_proj{suffix}.bias"] = (inner,)
    return shapes


@pytest.mark.parametrize(
    ("name", "d", "patches", "count"),
    [
        ("vim-t", 192, 196, 7_148_008),
        ("vim-s", 384, 196, 25_796_584),
        ("vim-b", 768, 196, 97_598_440),
        ("vim-t-stride8", 192, 729, 7_250_344),
        ("vim-s-stride8", 384, 729, 26_001_256),
    ],
)
def test_state_dict_is_the_published_one(name, d, patches, count):
    model = stm.create_model(name)
    state = model.state_dict()
    assert {key: tuple(value.shape) for key, value in state.items()} == published_shapes(d, patches)
    assert all(value.dtype == torch.float32 for value in state.values())
    assert sum(p.numel() for p in model.parameters()) == count
    assert not list(model.buffers())
    assert not model.training


def test_seed_decides_the_weights():
    first, again, other = (stm.create_model("vim-t", seed=seed).state_dict() for seed in (5, 5, 6))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])


def test_making_a_model_leaves_the_global_random_state():
    before = torch.random.get_rng_state()
    stm.create_model("vim-t", seed=5)
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize(
    ("shape", "named"),
    [((1, 3, 64, 48), ("64", "48")), ((1, 3, 224, 224), ("64", "224")), ((1, 1, 64, 64), ("1", "3")), ((3, 64, 64), ("3",))],
    ids=["width", "size", "channels", "no batch"],
)
def test_wrong_image_is_an_error(shape, named):
    model = stm.VisionMamba(small_config()).eval()
    with pytest.raises(stm.ShapeError) as error:
        model(torch.zeros(shape))
    assert all(value in str(error.value) for value in named)


def test_unknown_name_is_an_error():
    with pytest.raises(stm.StmError, match="vim-t"):  # the message lists what exists
        stm.create_model("vim-q")
