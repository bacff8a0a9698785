"""The training loop: data made on the fly, AdamW, cosine schedule, averaged weights, exact resumption."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from stm.checkpoint import file_sha256
from stm.config import VimConfig
from stm.data import NUM_CLASSES, VARIANTS, DigitPairs
from stm.registry import model_config
from stm.vim import VisionMamba

from .model import DECAYED, TrainingVim, from_state_dict, to_state_dict

CALIBRATION = (40, 120)
"""Steps between which speed is measured when --total-minutes decides the number of steps. A shorter warm-up stays at its peak until then."""
SAVE_SECONDS = 90.0
RESERVE_SECONDS = 30.0  # of a slot, for the last save and the judgement


@dataclass(frozen=True)
class Recipe:
    """What decides the result, together with seed and code. `steps` counts optimiser steps in all."""

    model: str
    steps: int
    batch: int
    lr: float
    warmup: int = 400
    final_lr: float = 0.01  # of lr
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.99)
    clip: float = 1.0
    label_smoothing: float = 0.05
    ema: float = 0.999
    ramp: tuple[int, int] = (1000, 3000)  # steps between which the images' clutter grows from none to all of it
    digit_loss: float = 1.0  # weight of the loss on each digit by itself, from the same logits


RECIPES = {
    "vim-n": Recipe("vim-n", steps=18_000, batch=256, lr=2e-3),
    "vim-t": Recipe("vim-t", steps=3_000, batch=256, lr=1e-3, warmup=300, ramp=(600, 1800)),
    # Two layers on the same images: for tests, on a CPU.
    "toy": Recipe("toy", steps=8, batch=4, lr=1e-3, warmup=4),
}


def recipe_config(name: str) -> VimConfig:
    if name == "toy":
        return VimConfig("toy", 16, depth=2, d_state=4, num_classes=NUM_CLASSES)
    return model_config(name, 224, NUM_CLASSES)


def learning_rate(recipe: Recipe, step: int, total: int | None) -> float:
    """Linear warm-up, then a cosine to `final_lr`; while `total` is unknown the warm-up and its peak."""
    rise = min(1.0, (step + 1) / recipe.warmup)
    if total is None or step < recipe.warmup:
        return recipe.lr * rise
    progress = min(1.0, (step - recipe.warmup) / max(1, total - recipe.warmup))
    return recipe.lr * (recipe.final_lr + (1 - recipe.final_lr) * 0.5 * (1 + math.cos(math.pi * progress)))


def clutter_at(recipe: Recipe, step: int) -> float:
    """Share of the images' clutter at a step: linear within the ramp, all of it from the ramp's end."""
    begin, end = recipe.ramp
    return 1.0 if step >= end else max(0.0, (step - begin) / max(1, end - begin))


def _check(recipe: Recipe) -> None:
    if recipe.steps < 1 or recipe.warmup < 1:
        raise SystemExit(f"steps {recipe.steps}, warmup {recipe.warmup}: both must be at least 1")
    if recipe.batch < 1 or recipe.batch % len(VARIANTS):
        raise SystemExit(f"batch {recipe.batch}: must be a multiple of {len(VARIANTS)}, as many images of each variant")
    if not 0 <= recipe.ramp[0] <= recipe.ramp[1]:
        raise SystemExit(f"ramp {recipe.ramp[0]} {recipe.ramp[1]}: the second step must not come before the first, the first not before 0")


def pair_loss(logits: Tensor, labels: Tensor, recipe: Recipe) -> Tensor:
    """Cross entropy of the class, and of each digit of the pair (the class probabilities summed over the other digit)."""
    loss = F.cross_entropy(logits, labels, label_smoothing=recipe.label_smoothing)
    if not recipe.digit_loss:
        return loss
    table = logits.view(-1, 10, 10)
    large = F.cross_entropy(table.logsumexp(2), torch.div(labels, 10, rounding_mode="floor"), label_smoothing=recipe.label_smoothing)
    small = F.cross_entropy(table.logsumexp(1), labels % 10, label_smoothing=recipe.label_smoothing)
    return loss + recipe.digit_loss * (large + small)


def normalise(images: Tensor, config: VimConfig, dtype: torch.dtype) -> Tensor:
    """uint8 images -> what the model takes."""
    mean, std = (255 * torch.tensor(values, device=images.device).view(3, 1, 1) for values in (config.mean, config.std))
    return ((images - mean) / std).to(dtype)


@torch.no_grad()
def accuracy(predict: Callable[[Tensor], Tensor], images: DigitPairs, count: int, batch: int) -> dict[str, float]:
    """Share of the first `count` images whose class, large digit and small digit are right."""
    right = torch.zeros(3)
    for start in range(0, count, batch):
        pictures, labels = images.batch(torch.arange(start, min(start + batch, count)))
        found = predict(pictures).argmax(1)
        hits = (
            found == labels,
            torch.div(found, 10, rounding_mode="floor") == torch.div(labels, 10, rounding_mode="floor"),
            found % 10 == labels % 10,
        )
        right += torch.stack([hit.sum() for hit in hits]).cpu()
    return {name: float(value) / count for name, value in zip(("top1", "large", "small"), right, strict=True)}


class Trainer:
    """Training of one model; picks the state up from `folder` where there is one.

    Args:
        overrides: fields of the recipe to set anew; only at the start of a training.
        total_minutes: choose the number of steps from the speed measured at the start.
        join: a folder with parts of a state that `save_parts` wrote.
        extend: lengthen a training that is under way to so many steps; the rest of the cosine is stretched. Kept in the settings.
        init: weights under the published names to begin with; only at the start of a training. Their hash, and what their file says of
            their own training, are kept in the settings. Images go on where that training stopped, so that none comes twice.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        *,
        overrides: Mapping[str, Any] | None = None,
        total_minutes: float | None = None,
        seed: int = 0,
        device: str = "cpu",
        backend: str = "torch",
        dtype: str = "float32",
        join: Path | None = None,
        extend: int | None = None,
        init: Path | None = None,
    ) -> None:
        self.folder, self.device, self.dtype = folder, torch.device(device), getattr(torch, dtype)
        self.settings: dict[str, Any] = {"recipe": asdict(replace(RECIPES[name], **(overrides or {}))), "seed": seed, "total_minutes": total_minutes}
        folder.mkdir(parents=True, exist_ok=True)
        if join is not None and not self._state_path.exists():
            _join_parts(join, folder)
        state = torch.load(self._state_path, map_location="cpu", weights_only=True) if self._state_path.exists() else None
        if state is not None:
            kept = state["settings"]
            if kept["recipe"]["model"] != name:
                raise SystemExit(f"{folder} holds the training of {kept['recipe']['model']!r}, not of {name!r}")
            if init is not None and kept.get("init", {}).get("sha256") != file_sha256(init):
                raise SystemExit(f"{folder} holds a training that did not begin with {init}; use another --state")
            changed = [
                f"{key} {value} (kept: {kept['recipe'][key]})"
                for key, value in (overrides or {}).items()
                if _plain(kept["recipe"][key]) != _plain(value)
            ]
            if changed or kept["seed"] != seed:
                raise SystemExit(f"{folder} holds a training with other settings: {', '.join(changed) or 'seed'}; use another --state")
            self.settings = kept
        elif init is not None:
            self.settings["init"] = {"sha256": file_sha256(init), **_training_of(init)}
        self.recipe = Recipe(**self.settings["recipe"])
        _check(self.recipe)
        self.config = recipe_config(name)
        self.model = TrainingVim(self.config, self.settings["seed"], backend, self.dtype).to(self.device)
        if state is None and init is not None:
            self.model.load_state_dict(from_state_dict({name: value.float() for name, value in load_file(init).items()}))
        groups = [
            {"params": [p for n, p in self.model.named_parameters() if n in DECAYED], "weight_decay": self.recipe.weight_decay},
            {"params": [p for n, p in self.model.named_parameters() if n not in DECAYED], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=self.recipe.lr, betas=self.recipe.betas, fused=self.device.type == "cuda")
        self.average = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        self.step, self.seconds = 0, 0.0
        self.total_steps: int | None = None if self.settings["total_minutes"] else self.recipe.steps
        if state is not None:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.average = {name: value.to(self.device) for name, value in state["average"].items()}
            self.step, self.seconds, self.total_steps = state["step"], state["seconds"], state["total_steps"]
        if extend is not None:
            if self.total_steps is None or extend <= self.step:
                raise SystemExit(f"--extend {extend}: the training in {folder} is at step {self.step} of {self.total_steps or 'an unknown number'}")
            self.settings.setdefault("extended", []).append({"at_step": self.step, "from": self.total_steps, "to": extend})
            self.total_steps = extend
        self._cut_log()
        self.data = [DigitPairs("train", variant, seed=self.settings["seed"], device=self.device) for variant in VARIANTS]
        self._stop = False
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: tuple[Tensor, Tensor]
        self._outputs: tuple[Tensor, Tensor]

    @property
    def _state_path(self) -> Path:
        return self.folder / "state.pt"

    @property
    def done(self) -> bool:
        return self.total_steps is not None and self.step >= self.total_steps

    # --- steps -------------------------------------------------------------------------------------------------------------

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Images and labels of a step, half of each variant: a matter of the step alone."""
        half = self.recipe.batch // len(self.data)
        first = self.settings.get("init", {}).get("images", 0) // len(self.data) + step * half
        indices = torch.arange(first, first + half, device=self.device)
        clutter = clutter_at(self.recipe, step)
        parts = [images.batch(indices, clutter) for images in self.data]
        return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])

    def train_step(self) -> dict[str, Tensor]:
        """One step; returns loss, accuracy and gradient norm, still on the device."""
        lr = learning_rate(self.recipe, self.step, self.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        images, labels = self.batch(self.step)
        loss, top1 = self._gradients(normalise(images, self.config, self.dtype), labels)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
        self.optimizer.step()
        keep = min(self.recipe.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.values()), [p.detach() for p in self.model.parameters()], 1 - keep)
        self.step += 1
        return {"loss": loss, "top1": top1, "norm": norm.detach()}

    def _forward_backward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.model(images)
        loss = pair_loss(logits, labels, self.recipe)
        loss.backward()
        return loss.detach(), (logits.argmax(1) == labels).float().mean()

    def _gradients(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and accuracy; leaves the gradients in the parameters. On a GPU in a CUDA graph, for the host's launches, not the GPU,
        would set the speed."""
        if self.device.type != "cuda":
            self.optimizer.zero_grad(set_to_none=True)
            return self._forward_backward(images, labels)
        if self._graph is None:
            self._inputs = (images.clone(), labels.clone())
            side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(2):  # compiles the kernels and lets the libraries take their workspaces
                    self.optimizer.zero_grad(set_to_none=True)
                    self._forward_backward(*self._inputs)
            torch.cuda.current_stream().wait_stream(side)
            self.optimizer.zero_grad(set_to_none=True)  # the gradients of the graph are its own and written anew by each replay
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._outputs = self._forward_backward(*self._inputs)
        for place, value in zip(self._inputs, (images, labels), strict=True):
            place.copy_(value)
        self._graph.replay()
        return self._outputs[0].clone(), self._outputs[1].clone()

    def run(self, deadline: float | None = None, log_every: int = 50) -> bool:
        """Train until the last step, `deadline` (time.monotonic), or SIGTERM; saves. Returns whether the last step is done."""
        sums: dict[str, Tensor] = {}
        since, last_save, mark = time.monotonic(), time.monotonic(), (self.step, time.monotonic())
        calibration: float | None = None
        with self._listening(), (self.folder / "log.jsonl").open("a", encoding="utf-8") as log:
            while not self.done and not self._stop:
                found = self.train_step()
                sums = {name: value + sums[name] if name in sums else value for name, value in found.items()}
                if self.total_steps is None and self.step in CALIBRATION:
                    self._wait()
                    if self.step == CALIBRATION[0]:
                        calibration = time.monotonic()
                    else:
                        self._choose_steps(calibration)
                if self.step % log_every == 0 or self.done:
                    values = {name: float(value) / (self.step - mark[0]) for name, value in sums.items()}  # waits for the device
                    now = time.monotonic()
                    row = {
                        "step": self.step,
                        "images": self.step * self.recipe.batch,
                        "lr": learning_rate(self.recipe, self.step - 1, self.total_steps),
                        **values,
                        "images_per_second": (self.step - mark[0]) * self.recipe.batch / (now - mark[1]),
                        "seconds": self.seconds + now - since,
                    }
                    log.write(json.dumps(row) + "\n")
                    log.flush()
                    if self.step % (10 * log_every) == 0 or self.done:
                        print(
                            f"step {self.step}/{self.total_steps} loss {row['loss']:.3f} top-1 {row['top1']:.3f} norm {row['norm']:.2f} "
                            f"{row['images_per_second']:.0f} images/s",
                            flush=True,
                        )
                    if not math.isfinite(row["loss"]):
                        raise SystemExit(f"the loss is {row['loss']} at step {self.step}; the last saved state is kept in {self.folder}")
                    sums, mark = {}, (self.step, now)
                    if now - last_save > SAVE_SECONDS:
                        self.seconds, since, last_save = self.seconds + now - since, now, now
                        self.save()
                    self._stop |= deadline is not None and now > deadline - RESERVE_SECONDS
        self._wait()
        self.seconds += time.monotonic() - since
        self.save()
        return self.done

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _choose_steps(self, since: float | None) -> None:
        """Fix the number of steps by the time that the calibration steps took; a slot that began after them takes the recipe's."""
        if since is None:
            self.total_steps = self.recipe.steps
            return
        seconds = (time.monotonic() - since) / (CALIBRATION[1] - CALIBRATION[0])
        self.total_steps = max(self.recipe.warmup * 2, CALIBRATION[1], round(60 * self.settings["total_minutes"] / seconds))
        print(f"{1000 * seconds:.1f} ms a step: {self.total_steps} steps in {self.settings['total_minutes']} minutes", flush=True)

    @contextmanager
    def _listening(self) -> Iterator[None]:
        """SIGTERM and SIGINT end the slot after the step."""

        def stop(number: int, frame: FrameType | None) -> None:
            self._stop = True

        before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    # --- files-------------------------------------------------------------------------------------------------------------

    def _cut_log(self) -> None:
        """Drop what was logged after the state was saved: a slot that was killed is repeated from there."""
        path = self.folder / "log.jsonl"
        rows = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        kept = [row for row in rows if row.endswith("}") and json.loads(row)["step"] <= self.step]
        if len(kept) < len(rows):
            path.write_text("".join(row + "\n" for row in kept), encoding="utf-8")

    def save(self) -> None:
        state = {
            "settings": self.settings,
            "model": self.model.state_dict(),
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "total_steps": self.total_steps,
        }
        aside = self._state_path.with_suffix(".part")
        torch.save(state, aside)
        os.replace(aside, self._state_path)

    def save_parts(self, out: Path, part_bytes: int) -> None:
        """The state in files of at most this size, for a transfer that bounds them."""
        content = self._state_path.read_bytes()
        for old in out.glob("state.pt.*"):
            old.unlink()
        for number, start in enumerate(range(0, len(content), part_bytes)):
            (out / f"state.pt.{number:02d}").write_bytes(content[start : start + part_bytes])

    def finish(self, out: Path, test_images: int, deadline: float | None = None) -> dict[str, Any]:
        """Write the averaged weights (float16) and judge them, as stm.VisionMamba in float32 runs them where training is done.

        Returns what result.json holds.
        """
        out.mkdir(parents=True, exist_ok=True)
        if out.resolve() != self.folder.resolve():
            shutil.copyfile(self.folder / "log.jsonl", out / "log.jsonl")
        weights = {name: value.to(torch.float16) for name, value in to_state_dict(self.average).items()}
        result: dict[str, Any] = {
            "model": self.recipe.model,
            "done": self.done,
            "step": self.step,
            "total_steps": self.total_steps,
            "images": self.step * self.recipe.batch,
            "training_minutes": round(self.seconds / 60, 2),
            "device": torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu",
            "torch": torch.__version__,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            **self.settings,
        }
        if self.device.type == "cuda":
            result["peak_memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 1)
        write_weights(out / f"{self.recipe.model}.safetensors", weights, result)  # first of all: judging may run out of time
        shipped = {name: value.float() for name, value in weights.items()}
        self.model.load_state_dict(from_state_dict(shipped))
        batch = min(500, test_images) if self.device.type == "cuda" else 20

        def judge(model: torch.nn.Module, dtype: torch.dtype) -> dict[str, dict[str, float]]:
            def predict(images: Tensor) -> Tensor:
                logits: Tensor = model(normalise(images, self.config, dtype))
                return logits

            return {variant: accuracy(predict, DigitPairs("test", variant, device=self.device), test_images, batch) for variant in VARIANTS}

        result["test_images"] = test_images
        result["test"] = judge(self.model, self.dtype)
        _write_json(out / "result.json", result)
        if self.done and (deadline is None or time.monotonic() < deadline):
            model = VisionMamba(self.config).to(self.device).eval()
            model.load_state_dict(shipped)
            result["test_float32"] = judge(model, torch.float32)
            _write_json(out / "result.json", result)
        return result


def write_weights(path: Path, weights: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """A bare state dict in the published names, with where it came from in the header."""
    from safetensors.torch import save_file

    aside = path.with_suffix(".part")
    save_file({name: value.cpu().contiguous() for name, value in weights.items()}, aside, metadata={"training": json.dumps(about)})
    os.replace(aside, path)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _training_of(weights: Path) -> dict[str, Any]:
    """Steps and images that the file's own training took, as its header says, what went before included; nothing of a stranger's file."""
    with safe_open(weights, "pt") as file:
        about = json.loads((file.metadata() or {}).get("training", "{}"))
    found = {key: about[key] for key in ("step", "total_steps", "images", "training_minutes", "recipe", "seed", "init") if key in about}
    if "init" in found:
        found["images"] += found["init"].get("images", 0)
    return found


def _join_parts(parts: Path, folder: Path) -> None:
    found = sorted(parts.glob("state.pt.[0-9][0-9]"))
    if not found:
        raise SystemExit(f"--join: no state.pt.NN in {parts}")
    (folder / "state.pt").write_bytes(b"".join(path.read_bytes() for path in found))
    if (parts / "log.jsonl").exists() and not (folder / "log.jsonl").exists():
        shutil.copyfile(parts / "log.jsonl", folder / "log.jsonl")
