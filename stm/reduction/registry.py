"""Names of the methods, and their schedules at equal token-layers and at the settings of the STM paper's table 2."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stm.config import VimConfig
from stm.errors import PlanError
from stm.plan import make_plan, preset_schedule, write_aside

from .base import Reduction
from .famba_v import FambaV, strategy_layers
from .hidden_state_alignment import HiddenStateAlignment
from .mtr import MTR, BalancedMTR
from .r_meeto import RMeeTo, interval_layers
from .random_drop import RandomDrop
from .token_recognition import TokenRecognition, keep_schedule
from .tome import BalancedToMe, ToMe
from .utr import UTR

EQUAL_TOKEN_LAYERS = {"tl-552": "stm-15", "tl-792": "stm-20", "tl-960": "stm-30", "tl-1076": "stm-40"}
"""Preset -> the merge plan whose token-layers it removes; the numbers hold for 197 tokens and 24 layers."""

Layers = Callable[[VimConfig], Iterable[int]]
_TINY, _SMALL, _BASE = 192, 384, 768


@dataclass(frozen=True)
class MethodEntry:
    """A method: how to make it, the layers it works in (None: those of the merge plan, k a side), and its schedules in
    table 2 of the STM paper by d_model, as far as the printed FLOPs tell them."""

    make: Callable[..., Reduction]
    layers: Layers | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    table2: Mapping[int, Callable[[VimConfig], dict[int, int]]] = field(default_factory=dict)


def _each(count: int) -> Callable[[VimConfig], dict[int, int]]:
    return lambda config: dict.fromkeys(interval_layers(config), count)


def _keep(rate: float, *after: int) -> Callable[[VimConfig], dict[int, int]]:
    return lambda config: keep_schedule(config, rate, after)


def _stages(config: VimConfig) -> list[int]:
    """Before layers 6, 10 and 14 of 24, as ToP-ViM's small model."""
    return sorted({max(1, round(layer * config.depth / 24)) for layer in (6, 10, 14)})


def _late_stages(config: VimConfig) -> list[int]:
    """Before layers 10, 15 and 20 of 24."""
    return sorted({max(1, round(layer * config.depth / 24)) for layer in (10, 15, 20)})


def _alternate(config: VimConfig) -> Iterable[int]:
    return strategy_layers(config, "alternate")


_R_MEETO = {size: _each(2) for size in (_TINY, _SMALL, _BASE)}  # 22 tokens: 1.409 G on Ti, -4.7 % on B
# One cut after layer 10 makes Ti's 1.29 G. B's -12.1 % is no natural plan of stages: 48 tokens before layer 12 fit it.
_TOP_VIM = {_TINY: _keep(0.8, 10), _BASE: lambda config: {12: 48}}

METHODS: dict[str, MethodEntry] = {
    "tome": MethodEntry(ToMe),
    "tome-balanced": MethodEntry(BalancedToMe),
    "r-meeto": MethodEntry(RMeeTo, interval_layers, {}, _R_MEETO),
    "r-meeto-true": MethodEntry(RMeeTo, interval_layers, {"cls_position": "true"}, _R_MEETO),
    "random": MethodEntry(RandomDrop),
    "mtr": MethodEntry(MTR),
    "mtr-balanced": MethodEntry(BalancedMTR),
    "hsa": MethodEntry(HiddenStateAlignment, _stages, {}, {**_TOP_VIM, _SMALL: _keep(0.75, 6, 12, 18)}),
    "token-recognition": MethodEntry(TokenRecognition, _stages, {}, {_TINY: _TOP_VIM[_TINY], _SMALL: _keep(0.8, 5, 9, 13)}),
    "utr": MethodEntry(UTR, _late_stages),
    "famba-v": MethodEntry(FambaV, _alternate),
}

PRESETS = (*EQUAL_TOKEN_LAYERS, "table2")


def list_reductions() -> list[str]:
    """Names that `create_reduction` knows."""
    return list(METHODS)


def create_reduction(name: str, config: VimConfig, preset: str | None = None, schedule: Mapping[int, int] | None = None, **options: Any) -> Reduction:
    """Make a method from a preset or a schedule (layer -> tokens removed before it).

    Args:
        name: one of `list_reductions()`.
        preset: "tl-552", "tl-792", "tl-960", "tl-1076" (equal token-layers), or "table2" (the STM paper's, models of
            ViM-Ti/S/B's width at 197 tokens).
        options: the method's own.

    Raises:
        PlanError: an unknown name or preset, both or neither of preset and schedule, or a schedule that does not fit.
    """
    if name not in METHODS:
        raise PlanError(f"no reduction {name!r}; choose from {', '.join(METHODS)}")
    if (preset is None) == (schedule is None):
        raise PlanError(f"{name}: give one of preset and schedule")
    entry = METHODS[name]
    if schedule is None:
        assert preset is not None
        schedule = method_schedule(name, config, preset)
    known = inspect.signature(entry.make).parameters.keys() - {"config", "schedule"}
    if unknown := options.keys() - known:
        raise PlanError(f"{name}: no option {', '.join(sorted(unknown))}; it has {', '.join(sorted(known)) or 'none'}")
    made = entry.make(config, schedule, **{**entry.options, **options})
    made.method, made.options = name, dict(options)
    return made


def parse_reduction(text: str, config: VimConfig) -> Reduction:
    """A method as the command line writes it: METHOD[:PRESET][,OPTION=VALUE..], for example "r-meeto:tl-792,metric=delta", or FILE.json
    that `save_reduction` wrote.

    Without a preset it is that of the STM paper's table 2.

    Raises:
        PlanError: an unknown method, preset or option, a value that does not fit, or a file that cannot be read or is another model's.
    """
    if text.endswith(".json"):
        return load_reduction(text, config)
    name, _, rest = text.partition(":")
    preset, options = "table2", {}
    for index, part in enumerate(piece.strip() for piece in rest.split(",")) if rest else ():
        key, equals, value = part.partition("=")
        if equals:
            options[key] = _value(value)
        elif index == 0:
            preset = part
        else:
            raise PlanError(f"reduction {text!r}: {part!r} is no OPTION=VALUE")
    try:
        return create_reduction(name, config, preset, **options)
    except TypeError as error:  # an option's value of another type
        raise PlanError(f"reduction {text!r}: {error}") from None


def _value(text: str) -> Any:
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def from_description(described: Mapping[str, Any], config: VimConfig) -> Reduction:
    """The method that `Reduction.describe` described.

    Raises:
        PlanError: it was not made by `create_reduction`, so its options are not known; or it does not fit the model.
    """
    if described.get("options") is None:
        raise PlanError(f"{described.get('method')}: its options were not noted; make it with stm.reduction.create_reduction")
    schedule = {int(layer): count for layer, count in described["schedule"].items()}
    return create_reduction(described["method"], config, schedule=schedule, **described["options"])


KIND, SCHEMA = "reduction", 1


def save_reduction(reduction: Reduction, path: str | os.PathLike[str]) -> None:
    """Write a method with its schedule; an existing file is replaced only when the new one is whole.

    Raises:
        PlanError: its options were not noted, or the file cannot be written.
    """
    described = reduction.describe()
    if described["options"] is None:
        raise PlanError(f"{reduction.name}: its options were not noted; make it with stm.reduction.create_reduction")
    config = reduction.config
    data = {"schema": SCHEMA, "kind": KIND, "model": config.name, "image_size": list(config.image_size), "seqlen": config.seqlen, **described}
    write_aside(Path(path), json.dumps(data, indent=1) + "\n", "reduction")


def load_reduction(path: str | os.PathLike[str], config: VimConfig) -> Reduction:
    """The method that `save_reduction` wrote.

    Raises:
        PlanError: no such file, not one of a reduction, or another model's; names both.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        found = (data.get("kind"), data.get("schema"))
        if found != (KIND, SCHEMA):
            raise PlanError(f"{path}: kind and schema are {found}, expected {(KIND, SCHEMA)}: give a file of `stm plan --optimize --reduction`")
        sizes = (data["model"], data["seqlen"])
        if sizes != (config.name, config.seqlen):
            raise PlanError(f"{path} is for {sizes[0]} with {sizes[1]} tokens, the model is {config.name} with {config.seqlen}: search it again")
        return from_description(data, config)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, PlanError):
            raise
        raise PlanError(f"cannot read the reduction {path}: {type(error).__name__}: {error}") from None


def method_schedule(name: str, config: VimConfig, preset: str) -> dict[int, int]:
    """A preset's schedule for a method.

    Raises:
        PlanError: an unknown preset, or one that this method does not have for this model.
    """
    entry = METHODS[name]
    if preset == "table2":
        if config.d_model not in entry.table2 or config.seqlen != 197 or config.depth != 24:
            sizes = {_TINY: "vim-t", _SMALL: "vim-s", _BASE: "vim-b"}
            known = ", ".join(sizes[size] for size in sorted(entry.table2)) or "no model"
            raise PlanError(f"{name}: table 2 gives its settings for {known} at 224 px; use one of {', '.join(EQUAL_TOKEN_LAYERS)}")
        return entry.table2[config.d_model](config)
    if preset not in EQUAL_TOKEN_LAYERS:
        raise PlanError(f"{name}: no preset {preset!r}; choose from {', '.join(PRESETS)}")
    plan = EQUAL_TOKEN_LAYERS[preset]
    if entry.layers is None:
        return {layer: left + right for layer, (left, right) in preset_schedule(config, plan).items()}
    return even_schedule(config, entry.layers(config), make_plan(config, preset=plan).token_layers_removed)


def even_schedule(config: VimConfig, layers: Iterable[int], token_layers: int) -> dict[int, int]:
    """Nearly the same count before each of these layers, so that `token_layers` are removed in all; the nearest number
    where it cannot be met (on 197 tokens and 24 layers every preset is met).

    Raises:
        PlanError: no layers, or too few token-layers for them.
    """
    layers = sorted(layers)
    worth = [config.depth - layer for layer in layers]  # token-layers that one token less saves
    if not layers or layers[0] < 1 or worth[-1] < 1:
        raise PlanError(f"even_schedule: layers {layers} are not layers 1..{config.depth - 1}")
    for miss in range(min(worth) + 1):
        for target in (token_layers - miss, token_layers + miss):
            for base in range(target // sum(worth), -1, -1):
                extra = _change(target - base * sum(worth), worth)
                if extra is not None and max(extra) <= max(2, base):
                    return {layer: base + more for layer, more in zip(layers, extra, strict=True) if base + more}
    raise PlanError(f"even_schedule: layers {layers} cannot remove {token_layers} token-layers")


def _change(amount: int, worth: list[int]) -> list[int] | None:
    """How many extra tokens a layer make `amount`, as few as possible and spread out; None if impossible."""
    best: list[list[int] | None] = [[0] * len(worth)]
    for value in range(1, amount + 1):
        options = []
        for index, coin in enumerate(worth):
            rest = best[value - coin] if value >= coin else None
            if rest is not None:
                options.append([count + (place == index) for place, count in enumerate(rest)])
        best.append(min(options, key=lambda counts: (max(counts), sum(counts), [-c for c in counts])) if options else None)
    return best[amount]


def schedule_text(reduction: Reduction) -> str:
    """The schedule in words, runs of equal counts together: "4 before 1..11: 153 left, TL 792"."""
    parts: list[list[Any]] = []
    layers = list(reduction.schedule)
    step = layers[1] - layers[0] if len(layers) > 1 else 1
    for layer, count in reduction.schedule.items():
        if parts and parts[-1][0] == count and parts[-1][2] + step == layer:
            parts[-1][2] = layer
        else:
            parts.append([count, layer, layer])

    def span(first: int, last: int) -> str:
        if first == last:
            return f"{first}"
        return f"{first}..{last}" if step == 1 else f"{first},{first + step}..{last}" if last > first + step else f"{first},{last}"

    words = ", ".join(f"{count} before {span(first, last)}" for count, first, last in parts) or "nothing"
    return f"{words}: {reduction.lengths[-1]} left, TL {reduction.token_layers_removed}"


def schedules_table(config: VimConfig, names: Iterable[str] | None = None) -> str:
    """Markdown table of every preset of every method on a model, with FLOPs (matching included)."""
    from .flops import reduction_summary

    lines = ["| method | preset | tokens removed | GFLOPs paper | GFLOPs true |", "|---|---|---|---|---|"]
    for name in METHODS if names is None else names:
        for preset in PRESETS:
            try:
                reduction = create_reduction(name, config, preset)
            except PlanError:
                if preset == "table2":
                    continue
                raise
            figures = reduction_summary(reduction)
            lines.append(f"| {name} | {preset} | {schedule_text(reduction)} | {figures['gflops_paper']:.3f} | {figures['gflops_true']:.3f} |")
    return "\n".join(lines)
