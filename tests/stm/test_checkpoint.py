"""Weights files: the official dict, bare state dicts, safetensors; and all that can be wrong."""

from __future__ import annotations

import argparse
import hashlib
import json
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import stm
from stm.checkpoint import pos_embed_change, resize_pos_embed
from tests.reference.weights import trained_like_

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def state() -> State:
    return trained_like_(stm.create_model("vim-t"), seed=1).state_dict()


@pytest.fixture(scope="module")
def ema_state(state) -> State:
    return {name: value * 1.5 for name, value in state.items()}


def small_state() -> State:
    """Enough for what does not depend on the model's sizes."""
    config = stm.VimConfig(name="small", d_model=16, depth=1, d_state=2, image_size=(32, 32), num_classes=3)
    return trained_like_(stm.VisionMamba(config), seed=1).state_dict()


def official(model: State, ema: State | None = None, **extra) -> dict:
    """A training checkpoint as the official code writes it."""
    content = {
        "model": model,
        "model_ema": ema,
        "optimizer": {
            "state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(4)}},
            "param_groups": [{"lr": 1e-4, "betas": (0.9, 0.999), "params": [0]}],
        },
        "lr_scheduler": {"base_values": [1e-4], "metric": None, "t_initial": 300},
        "epoch": 299,
        "scaler": "none",
        "args": argparse.Namespace(lr=1e-4, model="vim_tiny", resume="", clip_grad=None, if_amp=False),
    }
    if ema is None:
        del content["model_ema"]
    return content | extra


def save(path: Path, content: object, **options) -> Path:
    torch.save(content, path, **options)
    return path


def save_safetensors(path: Path, tensors: State) -> Path:
    """The format written by hand: header length, JSON header, raw little-endian data."""
    header, blobs, start = {"__metadata__": {"format": "pt"}}, [], 0
    for name, value in tensors.items():
        blob = value.contiguous().numpy().astype("<f4").tobytes()
        header[name] = {
            "dtype": "F32",
            "shape": list(value.shape),
            "data_offsets": [start, start + len(blob)],
        }
        blobs.append(blob)
        start += len(blob)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(blobs))
    return path


def assert_same(got: State, expected: State) -> None:
    assert got.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(got[name], expected[name])] == []


# --- what loads ------------------------------------------------------------------------------


@pytest.mark.parametrize(("ema", "source"), [(False, "model"), (True, "model_ema")])
def test_official_file(tmp_path, state, ema_state, ema, source):
    path = save(tmp_path / "vim.pth", official(state, ema_state))
    checkpoint = stm.load_checkpoint(path, ema=ema)
    expected = ema_state if ema else state
    assert checkpoint.source == source
    assert checkpoint.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert_same(checkpoint.state_dict, expected)
    model = stm.create_model("vim-t", checkpoint=path, ema=ema)
    assert_same(model.state_dict(), expected)
    assert not model.training


def test_official_file_in_the_old_format(tmp_path):
    """Before torch 1.6 a checkpoint was bare pickles, not a zip."""
    state = small_state()
    path = save(tmp_path / "old.pth", official(state, state), _use_new_zipfile_serialization=False)
    assert_same(stm.load_checkpoint(path).state_dict, state)


def test_official_file_without_ema(tmp_path):
    state = small_state()
    path = save(tmp_path / "vim.pth", official(state))
    assert stm.load_checkpoint(path).source == "model"
    with pytest.raises(stm.CheckpointError, match="model_ema"):
        stm.load_checkpoint(path, ema=True)


def test_bare_state_dict(tmp_path, state):
    path = save(tmp_path / "bare.pth", state)
    checkpoint = stm.load_checkpoint(path)
    assert checkpoint.source == "bare"
    assert_same(checkpoint.state_dict, state)
    assert_same(stm.create_model("vim-t", checkpoint=path).state_dict(), state)
    with pytest.raises(stm.CheckpointError):  # never the other weights than those asked for
        stm.load_checkpoint(path, ema=True)


def test_safetensors(tmp_path, state):
    path = save_safetensors(tmp_path / "vim.safetensors", state)
    checkpoint = stm.load_checkpoint(path)
    assert checkpoint.source == "bare"
    assert checkpoint.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert_same(checkpoint.state_dict, state)
    assert_same(stm.create_model("vim-t", checkpoint=path).state_dict(), state)


def test_text_path(tmp_path):
    state = small_state()
    path = save(tmp_path / "vim.pth", official(state, state))
    assert_same(stm.load_checkpoint(str(path)).state_dict, state)


def test_order_of_keys_is_free(tmp_path, state):
    path = save(tmp_path / "vim.pth", official(dict(reversed(state.items()))))
    assert_same(stm.create_model("vim-t", checkpoint=path).state_dict(), state)


# --- what does not fit the model -------------------------------------------------------------


def refused(path: Path, name: str = "vim-t", **options) -> str:
    with pytest.raises(stm.CheckpointError) as error:
        stm.create_model(name, checkpoint=path, **options)
    return str(error.value)


def test_missing_key(tmp_path, state):
    broken = {name: value for name, value in state.items() if name != "layers.7.mixer.A_b_log"}
    assert "layers.7.mixer.A_b_log" in refused(save(tmp_path / "vim.pth", official(broken)))


def test_extra_key(tmp_path, state):
    broken = state | {"layers.24.norm.weight": torch.ones(192)}
    assert "layers.24.norm.weight" in refused(save(tmp_path / "vim.pth", official(broken)))


def test_other_model(tmp_path, state):
    message = refused(save(tmp_path / "vim.pth", official(state)), name="vim-s")
    assert "192" in message
    assert "384" in message


def test_other_number_of_classes(tmp_path, state):
    message = refused(save(tmp_path / "vim.pth", official(state)), num_classes=10)
    assert "1000" in message
    assert "10" in message


def test_transposed_weight(tmp_path, state):
    """The right number of elements is not the right shape."""
    broken = state | {"layers.0.mixer.out_proj.weight": state["layers.0.mixer.out_proj.weight"].T.contiguous()}
    message = refused(save(tmp_path / "vim.pth", official(broken)))
    assert "layers.0.mixer.out_proj.weight" in message
    assert "192" in message
    assert "384" in message


@pytest.mark.parametrize("key", ["rope.freqs_cos", "rope.freqs_sin"])
def test_rope_means_another_architecture(tmp_path, state, key):
    message = refused(save(tmp_path / "vim_tiny_73p1.pth", official(state | {key: torch.zeros(196, 96)})))
    assert "rope" in message


def test_pos_embed_of_no_square_grid(tmp_path, state):
    """151 slots are no grid and a class token: nothing to interpolate from."""
    message = refused(save(tmp_path / "vim.pth", official(state | {"pos_embed": torch.zeros(1, 151, 192)})))
    assert "150" in message or "151" in message


@pytest.mark.parametrize("value", ["text", 3.0, None, [1.0]], ids=str)
def test_value_that_is_no_tensor(tmp_path, state, value):
    refused(save(tmp_path / "vim.pth", official(state | {"norm_f.weight": value})))


def test_integer_weights(tmp_path, state):
    refused(save(tmp_path / "vim.pth", official(state | {"norm_f.weight": torch.ones(192, dtype=torch.int64)})))


def test_weights_without_data(tmp_path, state):
    """A meta tensor has a shape and no values: copying from it leaves whatever was there."""
    empty = torch.ones(192, device="meta")
    assert "norm_f.weight" in refused(save(tmp_path / "vim.pth", official(state | {"norm_f.weight": empty})))


def test_small_file_of_a_huge_tensor(tmp_path, state):
    """An expanded tensor stores one number and claims terabytes; its size is judged before any copy."""
    huge = torch.ones(1).expand(1, 10**10 + 1, 192)
    assert "pos_embed" in refused(save(tmp_path / "vim.pth", official(state | {"pos_embed": huge})))


@pytest.mark.parametrize(
    "content",
    [{}, {"epoch": 3}, {"model": None}, {"model": [1, 2]}, {"model": {}}, [1, 2], torch.zeros(3), "text"],
    ids=["empty", "no model", "none", "list", "empty model", "a list", "a tensor", "text"],
)
def test_not_a_checkpoint(tmp_path, content):
    refused(save(tmp_path / "vim.pth", content))


# --- damaged files ---------------------------------------------------------------------------


def refused_anywhere(path: Path) -> None:
    with pytest.raises(stm.CheckpointError) as error:
        stm.load_checkpoint(path)
    assert path.name in str(error.value)
    refused(path)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.99])
@pytest.mark.parametrize("kind", ["zip", "old", "safetensors"])
def test_truncated(tmp_path, kind, share):
    state = small_state()
    if kind == "safetensors":
        path = save_safetensors(tmp_path / "vim.safetensors", state)
    else:
        path = save(tmp_path / "vim.pth", official(state, state), _use_new_zipfile_serialization=kind == "zip")
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    refused_anywhere(path)


@pytest.mark.parametrize("name", ["vim.pth", "vim.safetensors"])
def test_not_a_file(tmp_path, name):
    path = tmp_path / name
    refused_anywhere(path)  # absent
    path.mkdir()
    refused_anywhere(path)


@pytest.mark.parametrize("name", ["vim.pth", "vim.safetensors"])
@pytest.mark.parametrize(
    "content",
    [b"not a checkpoint" * 100, bytes(range(256)) * 40, b"\x80\x04N.", b"PK\x03\x04"],
    ids=["text", "bytes", "pickled None", "zip start"],
)
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_noise(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    refused_anywhere(path)


SAFETENSORS_HEADERS = {
    "beyond the file": {"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 1 << 40]}},
    "size and shape differ": {"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 8]}},
    "negative": {"w": {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]}},
    "backwards": {"w": {"dtype": "F32", "shape": [4], "data_offsets": [16, 0]}},
    "unknown dtype": {"w": {"dtype": "Q3", "shape": [4], "data_offsets": [0, 16]}},
    "huge shape": {"w": {"dtype": "F32", "shape": [1 << 40, 1 << 40], "data_offsets": [0, 16]}},
    "no offsets": {"w": {"dtype": "F32", "shape": [4]}},
    "not a dict": [1, 2],
    "entry not a dict": {"w": 3},
}


@pytest.mark.parametrize("header", SAFETENSORS_HEADERS.values(), ids=SAFETENSORS_HEADERS.keys())
def test_bad_safetensors_header(tmp_path, header):
    text = json.dumps(header).encode()
    path = tmp_path / "vim.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(16))
    refused_anywhere(path)


def test_huge_safetensors_header_length(tmp_path):
    path = tmp_path / "vim.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 62) + b"{}")
    refused_anywhere(path)


# --- hostile pickles -------------------------------------------------------------------------


class Bomb:
    """Unpickling it creates a file: the stand-in for any code."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self):
        return (open, (self.marker, "w"))


def hidden_in(where: str, marker: Path) -> object:
    state = small_state()
    bomb = Bomb(marker)
    return {
        "args": official(state, args=argparse.Namespace(lr=bomb)),
        "top": official(state, args=bomb),
        "model": official(state | {"norm_f.weight": bomb}),
        "whole": bomb,
    }[where]


def test_the_bomb_works(tmp_path):
    """Else the tests below would prove nothing."""
    marker = tmp_path / "marker"
    pickle.loads(pickle.dumps(Bomb(marker)))
    assert marker.exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("where", ["args", "top", "model", "whole"])
@pytest.mark.parametrize("kind", ["zip", "old", "pickle"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_pickled_code_never_runs(tmp_path, where, kind, suffix):
    marker, path = tmp_path / "marker", tmp_path / f"vim{suffix}"
    content = hidden_in(where, marker)
    if kind == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    refused_anywhere(path)
    assert not marker.exists()


def test_namespace_is_not_allowed_for_good(tmp_path):
    """Our loading must not widen what the user's own torch.load accepts."""
    path = save(tmp_path / "vim.pth", official(small_state()))
    stm.load_checkpoint(path)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)


# --- interpolation of pos_embed --------------------------------------------------------------


def bicubic_matrix(old: int, new: int) -> np.ndarray:
    """(new, old) weights: Keys' kernel with a = -0.75, half-pixel centres, edges repeated."""

    def kernel(x: float) -> float:
        a, x = -0.75, abs(x)
        if x <= 1:
            return (a + 2) * x**3 - (a + 3) * x**2 + 1
        return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0

    matrix = np.zeros((new, old))
    for i in range(new):
        centre = (i + 0.5) * old / new - 0.5
        first = int(np.floor(centre)) - 1
        for tap in range(first, first + 4):
            matrix[i, min(max(tap, 0), old - 1)] += kernel(centre - tap)
    return matrix


def resized_pos_embed(pos_embed: np.ndarray, grid: tuple[int, int], way: str) -> np.ndarray:
    """(slots, d_model) to (grid_h * grid_w + 1, d_model).

    "correct": the class slot is the middle one, before and after. "official": the fine-tuning
    code's way, which takes slot 0 for it although the token sits in the middle.
    """
    count = pos_embed.shape[0] - 1
    side, new_count = round(count**0.5), grid[0] * grid[1]
    assert side * side == count
    slot, new_slot = (0, 0) if way == "official" else (count // 2, new_count // 2)
    patches = np.delete(pos_embed, slot, axis=0).reshape(side, side, -1)
    patches = np.einsum("ai,bj,ijd->abd", bicubic_matrix(side, grid[0]), bicubic_matrix(side, grid[1]), patches)
    return np.insert(patches.reshape(new_count, -1), new_slot, pos_embed[slot], axis=0)


def test_bicubic_is_torchs():
    values = torch.randn(1, 1, 14, 14, dtype=torch.float64)
    theirs = torch.nn.functional.interpolate(values, size=(9, 27), mode="bicubic", align_corners=False)
    ours = bicubic_matrix(14, 9) @ values[0, 0].numpy() @ bicubic_matrix(14, 27).T
    np.testing.assert_allclose(ours, theirs[0, 0].numpy(), atol=1e-13)


@pytest.mark.parametrize("way", ["correct", "official"])
@pytest.mark.parametrize(
    ("name", "size", "grid"),
    [
        ("vim-t", 384, (24, 24)),
        ("vim-t", 128, (8, 8)),
        ("vim-t", (192, 256), (12, 16)),
        ("vim-t", (256, 192), (16, 12)),
        ("vim-t", (224, 256), (14, 16)),
        ("vim-t", (176, 208), (11, 13)),  # an odd number of patches
        ("vim-t-stride8", 224, (27, 27)),
    ],
    ids=str,
)
def test_pos_embed_is_interpolated(tmp_path, state, name, size, grid, way):
    path = save(tmp_path / "vim.pth", official(state))
    model = stm.create_model(name, checkpoint=path, image_size=size, pos_embed_resize=way)
    expected = resized_pos_embed(state["pos_embed"][0].double().numpy(), grid, way)
    got = model.pos_embed[0].detach().numpy()
    assert got.shape == expected.shape
    np.testing.assert_allclose(got, expected, atol=1e-5)
    loaded = model.state_dict()
    assert all(torch.equal(loaded[key], state[key]) for key in state if key != "pos_embed")


def test_correct_is_the_default(tmp_path, state):
    path = save(tmp_path / "vim.pth", official(state))
    default = stm.create_model("vim-t", checkpoint=path, image_size=256).pos_embed
    named = {way: stm.create_model("vim-t", checkpoint=path, image_size=256, pos_embed_resize=way).pos_embed for way in ("correct", "official")}
    assert torch.equal(default, named["correct"])
    assert (default - named["official"]).abs().max() > 0.1


def test_the_ways_are_not_mixed_up(tmp_path, state):
    """A class slot that stands out must come back in the middle, or, the official way, be smeared."""
    marked = state["pos_embed"].clone()
    marked[0, 98] = 100.0
    path = save(tmp_path / "vim.pth", official(state | {"pos_embed": marked}))
    correct = stm.create_model("vim-t", checkpoint=path, image_size=256, pos_embed_resize="correct").pos_embed[0]
    assert (correct[128] == 100).all()
    assert correct[torch.arange(257) != 128].max() < 10
    smeared = stm.create_model("vim-t", checkpoint=path, image_size=256, pos_embed_resize="official").pos_embed[0]
    assert torch.equal(smeared[0], marked[0, 0])
    assert (smeared.amax(dim=1) > 20).sum() > 1


@pytest.mark.parametrize("way", ["correct", "official"])
def test_same_size_is_left_alone(tmp_path, state, way):
    path = save(tmp_path / "vim.pth", official(state))
    model = stm.create_model("vim-t", checkpoint=path, pos_embed_resize=way)
    assert torch.equal(model.pos_embed.detach(), state["pos_embed"])


def test_unknown_way_is_an_error(tmp_path, state):
    path = save(tmp_path / "vim.pth", official(state))
    with pytest.raises(stm.StmError, match="correct"):  # the message lists the choices
        stm.create_model("vim-t", checkpoint=path, image_size=256, pos_embed_resize="nearest")


def test_square_weights_on_another_grid_of_as_many_patches():
    """14x14 = 7x28 = 196 patches: published weights are square, so they are interpolated, and the model says so."""
    config = stm.VimConfig("vim-t", d_model=8, image_size=(112, 448))
    pos = torch.randn(1, 197, 8)
    assert pos_embed_change(pos, config, "correct") == "14x14 -> 7x28"
    assert not torch.equal(resize_pos_embed(pos, config), pos)
    assert pos_embed_change(pos, config, "keep") == ""
    assert torch.equal(resize_pos_embed(pos, config, "keep"), pos)
    assert pos_embed_change(pos, config.with_changes(image_size=(224, 224)), "correct") == ""
    assert pos_embed_change(torch.randn(1, 13, 8), config.with_changes(image_size=(48, 64)), "correct") == ""  # 12: no square


def test_provenance_says_what_was_interpolated(tmp_path):
    torch.save(stm.create_model("vim-t").state_dict(), tmp_path / "t.pth")
    model = stm.create_model("vim-t", checkpoint=tmp_path / "t.pth", image_size=(64, 96))
    assert "interpolated 14x14 -> 4x6" in str(model.provenance)
    assert "interpolated" not in str(stm.create_model("vim-t", checkpoint=tmp_path / "t.pth").provenance)
