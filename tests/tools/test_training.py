"""The training tools: kernels against torch, the stacked model against stm's, resuming bit by bit."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import stm
from stm.data import CLASS_NAMES, DigitPairs
from tools.training.loop import CALIBRATION, RECIPES, Recipe, Trainer, clutter_at, learning_rate, pair_loss, recipe_config
from tools.training.model import TrainingVim, from_state_dict, to_state_dict

ROOT = Path(__file__).parents[2]
CONFIG = stm.VimConfig("small", 32, depth=2, d_state=16, image_size=(32, 48), num_classes=7)

KERNELS = """
import json, torch
from stm.config import VimConfig
from tools.training.check import compare
from tools.training.model import TrainingVim
torch.set_num_threads(1)
rows = {}
# 10 tokens and 13: even, odd, one segment of the convolution; 16 channels and 96: one block and three; 2 tokens: the shortest walk of pairs.
# 8 x 15 patches: two segments, the second shorter.
float64, float32, bfloat16 = torch.float64, torch.float32, torch.bfloat16
cases = [(8, (48, 48), 16, 4, 2, [float64, bfloat16]), (48, (64, 48), 8, 3, 2, [float32]), (8, (16, 16), 16, 4, 3, [float64])]
for d, size, state, rank, batch, dtypes in [*cases, (8, (128, 240), 4, 1, 1, [float64])]:
    config = VimConfig("x", d, depth=1, d_state=state, dt_rank=rank, image_size=size)
    for dtype in dtypes:
        for name, error, bound in compare(config, batch, dtype, "cpu"):
            # The interpreter cuts bfloat16 off where a GPU rounds.
            rows[f"{size} {dtype} {name}"] = (error, 5 * bound if dtype == bfloat16 else bound)
config = VimConfig("x", 16, depth=3, d_state=4, image_size=(32, 32), num_classes=7)
images, weight = torch.randn(2, 3, 32, 32), torch.randn(2, 7)
models = [TrainingVim(config, seed=1, backend=backend) for backend in ("triton", "torch")]
logits = [model(images) for model in models]
gradients = [torch.autograd.grad((y * weight).sum(), list(model.parameters())) for y, model in zip(logits, models)]
names = ["logits", *(name for name, _ in models[0].named_parameters())]
for name, a, b in zip(names, *([y.detach(), *g] for y, g in zip(logits, gradients))):
    rows[f"model {name}"] = (float((a - b).abs().max() / b.abs().max()), 1e-5)
print(json.dumps(rows))
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed; the kernels need it, the package does not")
def test_kernels_and_their_gradients_are_torchs() -> None:
    """Under Triton's interpreter, which wants its variable before the kernels are made, hence the process."""
    ran = subprocess.run(
        [sys.executable, "-c", KERNELS],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr
    rows = json.loads(ran.stdout)
    assert len(rows) == 5 * 14 + 1 + 17
    assert {name: row for name, row in rows.items() if not row[0] <= row[1]} == {}


# --- model -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair() -> tuple[TrainingVim, stm.VisionMamba]:
    training = TrainingVim(CONFIG, seed=1)
    model = stm.VisionMamba(CONFIG)
    model.load_state_dict(to_state_dict(training.state_dict()), strict=True)
    return training, model


def test_stacked_weights_translate_both_ways(pair: tuple[TrainingVim, stm.VisionMamba]) -> None:
    training, model = pair
    back = from_state_dict(model.state_dict())
    assert back.keys() == training.state_dict().keys()
    assert all(torch.equal(back[name], value) for name, value in training.state_dict().items())


def test_the_training_model_computes_what_stm_does(pair: tuple[TrainingVim, stm.VisionMamba]) -> None:
    training, model = pair
    images, weight = torch.randn(2, 3, 32, 48), torch.randn(2, 7)
    a, b = training(images), model(images)
    assert torch.allclose(a, b, atol=1e-5)
    (a * weight).sum().backward()
    (b * weight).sum().backward()
    wanted = from_state_dict({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    for name, p in training.named_parameters():
        assert p.grad is not None
        assert (p.grad - wanted[name]).abs().max() <= 1e-4 * wanted[name].abs().max(), name


def test_initial_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(3)
    first = TrainingVim(CONFIG, seed=5).state_dict()
    assert all(torch.equal(first[name], value) for name, value in TrainingVim(CONFIG, seed=5).state_dict().items())
    assert not torch.equal(first["in_proj"], TrainingVim(CONFIG, seed=6).state_dict()["in_proj"])
    delta = F.softplus(first["dt_bias"])
    assert delta.min() > 9e-4
    assert delta.max() < 0.11


def test_overlapping_patches_and_unknown_backends_are_refused() -> None:
    with pytest.raises(ValueError, match="overlap"):
        TrainingVim(CONFIG.with_changes(stride=8))
    with pytest.raises(ValueError, match="cuda"):
        TrainingVim(CONFIG, backend="cuda")


# --- schedule and loss -----------------------------------------------------------------------------------------------------


def test_learning_rate_rises_then_falls() -> None:
    recipe = Recipe("x", steps=1000, batch=1, lr=1.0, warmup=100)
    assert learning_rate(recipe, 0, 1000) == pytest.approx(0.01)
    assert learning_rate(recipe, 99, 1000) == learning_rate(recipe, 100, 1000) == 1
    assert learning_rate(recipe, 550, 1000) == pytest.approx(0.505)
    assert learning_rate(recipe, 999, 1000) == pytest.approx(0.01, abs=1e-4)
    assert learning_rate(recipe, 50, None) == learning_rate(recipe, 50, 1000)


@pytest.mark.parametrize("warmup", [1, 40, 100, 300])
def test_learning_rate_does_not_depend_on_when_the_number_of_steps_is_known_in_the_warm_up(warmup: int) -> None:
    recipe = Recipe("x", steps=1000, batch=1, lr=1.0, warmup=warmup)
    unknown = [learning_rate(recipe, step, None) for step in range(CALIBRATION[1])]
    assert unknown[:warmup] == [learning_rate(recipe, step, 1000) for step in range(min(warmup, CALIBRATION[1]))]
    assert all(rate == 1 for rate in unknown[warmup:])  # the peak goes on until the number is known


@pytest.mark.parametrize(
    ("ramp", "clutter"),
    [((0, 1), [0.0, 1.0, 1.0]), ((0, 0), [1.0, 1.0, 1.0]), ((1, 3), [0.0, 0.0, 0.5]), ((2, 2), [0.0, 0.0, 1.0])],
)
def test_clutter_ramps(ramp: tuple[int, int], clutter: list[float]) -> None:
    recipe = Recipe("x", steps=10, batch=1, lr=1.0, ramp=ramp)
    assert [clutter_at(recipe, step) for step in range(3)] == clutter


@pytest.mark.parametrize("overrides", [{"warmup": 0}, {"ramp": (3, 2)}, {"ramp": (-1, 2)}, {"steps": 0}, {"batch": 3}])
def test_recipes_that_make_no_sense_are_refused(tmp_path: Path, overrides: dict[str, object]) -> None:
    with pytest.raises(SystemExit, match=next(iter(overrides))):
        Trainer("toy", tmp_path, overrides=overrides)


def test_pair_loss_adds_each_digit_by_itself() -> None:
    logits, labels = torch.randn(5, 100, dtype=torch.float64), torch.tensor([0, 37, 99, 40, 5])
    plain = Recipe("x", 1, 1, 1.0, label_smoothing=0.0, digit_loss=0.0)
    both = Recipe("x", 1, 1, 1.0, label_smoothing=0.0, digit_loss=0.5)
    probability = logits.softmax(1)
    large = torch.stack([probability[:, 10 * d : 10 * d + 10].sum(1) for d in range(10)], 1)
    small = torch.stack([probability[:, d::10].sum(1) for d in range(10)], 1)
    rows = torch.arange(5)
    wanted = -(probability[rows, labels].log() + 0.5 * (large[rows, labels // 10].log() + small[rows, labels % 10].log())).mean()
    assert pair_loss(logits, labels, plain) == pytest.approx(F.cross_entropy(logits, labels).item())
    assert pair_loss(logits, labels, both) == pytest.approx(wanted.item())


def test_recipes_are_of_models_with_these_classes() -> None:
    for name, recipe in RECIPES.items():
        assert recipe.model == name
        assert recipe_config(name).num_classes == len(CLASS_NAMES)
        assert recipe.batch % 2 == 0


# --- the loop: two layers, four images a step ---------------------------------------------------------------------------------


def losses(folder: Path) -> list[tuple[int, float, float]]:
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"], row["norm"]) for row in rows]


def train(folder: Path, steps: int | None = None, **options: object) -> Trainer:
    """Train "toy", to the end or for that many steps of this slot (stopped as a server stops a program)."""
    trainer = Trainer("toy", folder, overrides={"steps": 4}, **options)  # type: ignore[arg-type]
    step = trainer.train_step

    def counted() -> dict[str, torch.Tensor]:
        found = step()
        if trainer.step == steps:
            os.kill(os.getpid(), signal.SIGTERM)
        return found

    trainer.train_step = counted  # type: ignore[method-assign]
    assert trainer.run(log_every=1) == (steps is None)
    return trainer


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Trainer, Path]:
    folder = tmp_path_factory.mktemp("whole")
    return train(folder), folder


def test_a_stopped_training_goes_on_bit_by_bit(whole: tuple[Trainer, Path], tmp_path: Path) -> None:
    uninterrupted, folder = whole
    assert len(losses(folder)) == 4
    first = train(tmp_path / "a", steps=2)
    assert first.step == 2
    first.save_parts(tmp_path, 20_000)  # as it travels between machines
    assert len(list(tmp_path.glob("state.pt.*"))) > 2
    (tmp_path / "log.jsonl").write_bytes((tmp_path / "a" / "log.jsonl").read_bytes())
    with (tmp_path / "log.jsonl").open("a") as log:  # of steps after the last save, as a killed slot leaves them
        log.write('{"step": 3, "loss": 1.0}\n{"step": 4, "lo')
    torch.manual_seed(99)
    second = train(tmp_path / "b", join=tmp_path)
    assert losses(tmp_path / "b") == losses(folder)
    for name, value in uninterrupted.average.items():
        assert torch.equal(value, second.average[name])
    for name, value in uninterrupted.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name])


def test_the_images_of_a_step_are_a_matter_of_the_step(whole: tuple[Trainer, Path]) -> None:
    trainer, _ = whole
    images, labels = trainer.batch(1)
    assert images.shape == (4, 3, 224, 224)
    assert torch.equal(trainer.batch(1)[0], images)
    assert not torch.equal(trainer.batch(2)[0], images)
    assert len(labels) == 4


def test_what_a_training_leaves_is_a_checkpoint_of_the_averaged_weights(whole: tuple[Trainer, Path], tmp_path: Path) -> None:
    trainer, _ = whole
    average = to_state_dict(trainer.average)
    result = trainer.finish(tmp_path, test_images=4)
    loaded = stm.load_checkpoint(tmp_path / "toy.safetensors")
    assert loaded.state_dict.keys() == average.keys()
    for name, value in loaded.state_dict.items():
        assert torch.equal(value, average[name].half())
    assert (result["done"], result["images"], result["recipe"]["steps"]) == (True, 16, 4)
    assert json.loads((tmp_path / "result.json").read_text()) == json.loads(json.dumps(result))
    assert result["test"].keys() == result["test_float32"].keys() == {"centred", "anywhere"}
    assert all(0 <= share <= 1 for row in result["test"].values() for share in row.values())
    assert (tmp_path / "log.jsonl").exists()


def test_settings_cannot_change_on_the_way(whole: tuple[Trainer, Path]) -> None:
    _, folder = whole
    with pytest.raises(SystemExit, match=r"batch 8 \(kept: 4\)"):
        Trainer("toy", folder, overrides={"batch": 8})
    with pytest.raises(SystemExit, match="seed"):
        Trainer("toy", folder, seed=1)
    with pytest.raises(SystemExit, match="'toy'"):
        Trainer("vim-n", folder)


def test_a_training_under_way_can_be_lengthened(tmp_path: Path) -> None:
    train(tmp_path, steps=2)
    with pytest.raises(SystemExit, match="at step 2 of 4"):
        Trainer("toy", tmp_path, extend=2)
    longer = Trainer("toy", tmp_path, extend=6)
    assert longer.run(log_every=1)
    assert longer.step == 6
    again = Trainer("toy", tmp_path)
    assert (again.total_steps, again.settings["extended"]) == (6, [{"at_step": 2, "from": 4, "to": 6}])
    with pytest.raises(SystemExit, match="an unknown number"):
        Trainer("toy", tmp_path / "new", total_minutes=1, extend=5)


def test_steps_chosen_by_the_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer("toy", tmp_path, total_minutes=10)
    assert trainer.total_steps is None
    assert not trainer.done
    monkeypatch.setattr("time.monotonic", lambda: 108.0)
    trainer._choose_steps(100.0)
    assert trainer.total_steps == 6000  # 80 steps took 8 seconds
    trainer._choose_steps(None)
    assert trainer.total_steps == RECIPES["toy"].steps


def test_init_goes_on_from_weights_with_images_not_seen_before(tmp_path):
    first = Trainer("toy", tmp_path / "a", overrides={"steps": 2})
    first.run()
    first.finish(tmp_path / "a", test_images=4)
    weights = tmp_path / "a" / "toy.safetensors"
    then = Trainer("toy", tmp_path / "b", overrides={"steps": 3, "ramp": (0, 0)}, init=weights)
    for name, value in to_state_dict(then.model.state_dict()).items():
        assert torch.equal(value, load_file(weights)[name].float()), name
    assert torch.equal(then.average["head_weight"], then.model.head_weight.detach())
    begun = then.settings["init"]
    assert (begun["images"], begun["step"]) == (2 * RECIPES["toy"].batch, 2)
    seen, _ = DigitPairs("train", "centred", seed=0).batch(torch.arange(4, 6), 1.0)  # after the four centred images of the first training
    assert torch.equal(then.batch(0)[0][:2], seen)
    then.run()
    result = then.finish(tmp_path / "b", test_images=4)
    assert result["init"]["sha256"] == begun["sha256"]
    third = Trainer("toy", tmp_path / "c", init=tmp_path / "b" / "toy.safetensors")
    assert third.settings["init"]["images"] == 5 * RECIPES["toy"].batch
    Trainer("toy", tmp_path / "b", init=weights)  # the same command goes on
    with pytest.raises(SystemExit, match="did not begin with"):
        Trainer("toy", tmp_path / "a", init=weights)


def test_a_diverged_training_stops_and_keeps_the_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer("toy", tmp_path)
    bad = {"loss": torch.tensor(math.nan), "top1": torch.tensor(0.0), "norm": torch.tensor(1.0)}

    def step() -> dict[str, torch.Tensor]:
        trainer.step += 1
        return bad

    monkeypatch.setattr(trainer, "train_step", step)
    with pytest.raises(SystemExit, match="the loss is nan at step 1"):
        trainer.run(log_every=1)
    assert not (tmp_path / "state.pt").exists()
