"""MergePlan: which tokens merge into which, layer by layer; JSON, one checked door, generators.

A plan is data. For each layer it lists groups `sources -> target` in positions of the sequence as it enters
that layer, after all earlier merges. Sequential Token Merging (STM, arXiv 2509.22691) merges before layer
l >= 1, on the residual stream: x_q <- x_q + sum_p w_p x_p, then the sources vanish (eq. 11).
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .config import MAX_TOKENS, VimConfig, image_size_pair
from .errors import PlanError

SCHEMA = 1
MAX_PLAN_BYTES = 16 * 1024 * 1024
WEIGHT_MODES = ("hsp", "hsp_literal", "decay", "constant", "sum", "mean")
RULES = ("edge", "frontier", "spread", "one_sided")


@dataclass(frozen=True)
class Group:
    """Tokens at `sources` merge into the token at `target`."""

    sources: tuple[int, ...]
    target: int


def write_aside(path: Path, text: str, what: str) -> None:
    """Write a text file; an existing one is replaced only when the new one is whole.

    Raises:
        PlanError: it cannot be written.
    """
    aside = path.with_name(path.name + ".part")
    try:
        aside.write_text(text, encoding="utf-8")
        os.replace(aside, path)
    except OSError as error:
        raise PlanError(f"cannot write {what} {path}: {error.strerror or error}") from None
    finally:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)


@dataclass(frozen=True)
class MergePlan:
    """A fixed merge plan for one model at one image size.

    Args:
        model: name the plan was made for.
        image_size: (height, width) in pixels.
        seqlen: tokens into layer 0, class token included.
        cls_index: position of the class token there.
        depth: number of layers of the model.
        weights: one of `WEIGHT_MODES`.
        layers: layer -> groups, positions as they enter that layer.
        constants: layer -> one weight a source in ascending source position; for weights="constant" only.
        proportional_decay: a token made of s originals decays s times as long in the scan.

    Raises:
        PlanError: a rule of DESIGN section 3 is broken; names layer, position and the mend.
    """

    model: str
    image_size: tuple[int, int]
    seqlen: int
    cls_index: int
    depth: int = 24
    weights: str = "hsp"
    layers: Mapping[int, tuple[Group, ...]] = field(default_factory=dict)
    constants: Mapping[int, tuple[float, ...]] | None = None
    proportional_decay: bool = False

    def __post_init__(self) -> None:
        _check(self)

    @classmethod
    def of(cls, config: VimConfig, layers: Mapping[int, tuple[Group, ...]], **fields: Any) -> MergePlan:
        """A plan for a model's configuration; `fields`: weights, constants, proportional_decay."""
        return cls(config.name, config.image_size, config.seqlen, config.cls_index, config.depth, layers=layers, **fields)

    # --- derived, never stored ---------------------------------------------------------------------------------

    def groups(self, layer: int) -> tuple[Group, ...]:
        """Groups merged before `layer`, by target position."""
        return self.layers.get(layer, ())

    def pairs(self, layer: int) -> list[tuple[int, int]]:
        """(source, target) of every source merged before `layer`, ascending by source."""
        return sorted((source, group.target) for group in self.groups(layer) for source in group.sources)

    def removed(self, layer: int) -> int:
        """Number of tokens that vanish before `layer`."""
        return sum(len(group.sources) for group in self.groups(layer))

    @property
    def lengths(self) -> list[int]:
        """Tokens that each layer computes on, after the merge before it."""
        lengths, left = [], self.seqlen
        for layer in range(self.depth):
            left -= self.removed(layer)
            lengths.append(left)
        return lengths

    @property
    def cls_positions(self) -> list[int]:
        """Position of the class token in what each layer computes on."""
        positions, cls = [], self.cls_index
        for layer in range(self.depth):
            cls -= sum(source < cls for source, _ in self.pairs(layer))
            positions.append(cls)
        return positions

    @property
    def tokens_left(self) -> int:
        """Tokens after the last merge, class token included."""
        return self.lengths[-1]

    @property
    def token_layers_removed(self) -> int:
        """Sum over layers of the tokens that are missing there; what a plan saves."""
        return sum(self.seqlen - length for length in self.lengths)

    def keep(self, layer: int) -> list[int]:
        """Positions that stay at the merge before `layer`, in order."""
        length = self.seqlen if layer == 0 else self.lengths[layer - 1]
        gone = {source for source, _ in self.pairs(layer)}
        return [position for position in range(length) if position not in gone]

    def members(self) -> Iterator[list[list[int]]]:
        """For each layer, the original positions that each of its tokens stands for."""
        tokens = [[position] for position in range(self.seqlen)]
        for layer in range(self.depth):
            tokens = list(tokens)  # what was yielded stays as it is
            for source, target in self.pairs(layer):
                tokens[target] = tokens[target] + tokens[source]
            gone = {source for source, _ in self.pairs(layer)}
            tokens = [token for position, token in enumerate(tokens) if position not in gone]
            yield tokens

    def sizes(self) -> list[list[int]]:
        """For each layer, how many original tokens each of its tokens stands for."""
        return [[len(token) for token in tokens] for tokens in self.members()]

    @property
    def merges(self) -> bool:
        return any(self.layers.values())

    # --- JSON --------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        out: dict[str, Any] = {
            "schema": SCHEMA,
            "model": self.model,
            "image_size": list(self.image_size),
            "seqlen": self.seqlen,
            "cls_index": self.cls_index,
            "depth": self.depth,
            "weights": self.weights,
            "proportional_decay": self.proportional_decay,
            "layers": {
                str(layer): [{"sources": list(g.sources), "target": g.target} for g in groups] for layer, groups in sorted(self.layers.items())
            },
        }
        if self.constants is not None:
            out["constants"] = {str(layer): list(values) for layer, values in sorted(self.constants.items())}
        return out

    def to_json(self) -> str:
        """JSON text, a layer a line so that two plans can be compared with diff."""
        data = self.to_dict()
        layers, constants = data.pop("layers"), data.pop("constants", None)
        lines = [f"  {json.dumps(key)}: {json.dumps(value)}," for key, value in data.items()]

        def block(name: str, table: dict[str, Any]) -> str:
            rows = ",\n".join(f"    {json.dumps(key)}: {json.dumps(value)}" for key, value in table.items())
            return f"  {json.dumps(name)}: {{\n{rows}\n  }}" if rows else f"  {json.dumps(name)}: {{}}"

        blocks = [block("layers", layers)] + ([block("constants", constants)] if constants is not None else [])
        return "{\n" + "\n".join(lines) + "\n" + ",\n".join(blocks) + "\n}\n"

    @classmethod
    def from_dict(cls, data: Any) -> MergePlan:
        """Read what `to_dict` wrote.

        Raises:
            PlanError: unknown or missing keys, a wrong type, another schema, or a broken rule.
        """
        if not isinstance(data, dict):
            raise PlanError(f"a plan is a JSON object, this is {type(data).__name__}")
        if type(data.get("schema")) is not int or data["schema"] != SCHEMA:
            raise PlanError(f"plan schema is {data.get('schema')!r}, this version reads {SCHEMA}; make the plan anew: `stm plan`")
        required = {"schema", "model", "image_size", "seqlen", "cls_index", "weights", "layers"}
        allowed = required | {"depth", "proportional_decay", "constants"}
        if missing := sorted(required - data.keys()):
            raise PlanError(f"plan lacks {', '.join(missing)}; make it anew: `stm plan`")
        if extra := sorted(data.keys() - allowed):
            raise PlanError(f"plan has unknown keys {', '.join(map(repr, extra))}; allowed: {', '.join(sorted(allowed))}")
        size = data["image_size"]
        if not isinstance(size, list) or len(size) != 2:
            raise PlanError(f"plan image_size is {size!r}; it must be [height, width]")
        layers = {
            _layer_number(key): tuple(_read_group(key, group) for group in _as_list(groups, f"layer {key}"))
            for key, groups in _as_dict(data["layers"], "layers").items()
        }
        constants = None
        if data.get("constants") is not None:
            constants = {
                _layer_number(key): tuple(_as_float(value, key) for value in _as_list(values, f"constants of layer {key}"))
                for key, values in _as_dict(data["constants"], "constants").items()
            }
        return cls(
            model=data["model"],
            image_size=(_as_int(size[0], "image_size"), _as_int(size[1], "image_size")),
            seqlen=_as_int(data["seqlen"], "seqlen"),
            cls_index=_as_int(data["cls_index"], "cls_index"),
            depth=_as_int(data.get("depth", 24), "depth"),
            weights=data["weights"],
            layers=layers,
            constants=constants,
            proportional_decay=data.get("proportional_decay", False),
        )

    @classmethod
    def from_json(cls, text: str) -> MergePlan:
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:  # ValueError: not JSON, or a number of thousands of digits
            raise PlanError(f"plan is not JSON: {error}") from None
        return cls.from_dict(data)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan; an existing file is replaced only when the new one is whole.

        Raises:
            PlanError: the file cannot be written.
        """
        write_aside(Path(path), self.to_json(), "plan")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> MergePlan:
        """Read a plan file.

        Raises:
            PlanError: no such file, too large, not a plan.
        """
        path = Path(path)
        try:
            if path.stat().st_size > MAX_PLAN_BYTES:
                raise PlanError(f"{path} has {path.stat().st_size} bytes; a plan has at most {MAX_PLAN_BYTES}")
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise PlanError(f"cannot read plan {path}: {error}") from None
        try:
            return cls.from_json(text)
        except PlanError as error:
            raise PlanError(f"{path}: {error}") from None

    def check_fits(self, config: VimConfig) -> None:
        """Refuse a model that the plan was not made for.

        Raises:
            PlanError: name, image size, length, class position or depth differ; names both.
        """
        height, width = config.image_size
        again = f"make one: `stm plan --model {config.name} --image-size {height}x{width}`"
        if self.model != config.name:
            raise PlanError(f"the plan was made for model {self.model!r}, this is {config.name!r}; {again}")
        if self.seqlen != config.seqlen or self.image_size != config.image_size:
            raise PlanError(
                f"layer 0 of {config.name!r} gets {config.seqlen} tokens (image size {height}x{width}), "
                f"the plan expects {self.seqlen} (image size {self.image_size[0]}x{self.image_size[1]}); {again}"
            )
        if self.cls_index != config.cls_index:
            raise PlanError(f"the class token of {config.name!r} is at {config.cls_index}, the plan expects {self.cls_index}; {again}")
        if self.depth != config.depth:
            raise PlanError(f"{config.name!r} has {config.depth} layers, the plan expects {self.depth}; {again}")

    def with_weights(self, weights: str) -> MergePlan:
        return replace(self, weights=weights, constants=None)


# --- reading ----------------------------------------------------------------------------------------------------------


def _as_int(value: Any, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise PlanError(f"plan {where}: {value!r} is not a whole number")
    return value


def _as_float(value: Any, where: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not -1e30 < value < 1e30:
        raise PlanError(f"plan constants of layer {where}: {value!r:.40} is not a finite number (at most 1e30)")
    return float(value)


def _as_list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise PlanError(f"plan {where}: expected a list, got {type(value).__name__}")
    return value


def _as_dict(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise PlanError(f"plan {where}: expected an object, got {type(value).__name__}")
    return value


def _layer_number(key: str) -> int:
    if not (len(key) <= 6 and key.isascii() and key.isdigit() and str(int(key)) == key):
        raise PlanError(f"plan layers: {key!r} is not a layer number")
    return int(key)


def _read_group(layer: str, group: Any) -> Group:
    if not isinstance(group, dict) or group.keys() != {"sources", "target"}:
        raise PlanError(f'plan layer {layer}: a group is {{"sources": [..], "target": n}}, got {group!r:.80}')
    sources = tuple(_as_int(source, f"layer {layer} source") for source in _as_list(group["sources"], f"layer {layer} sources"))
    return Group(sources, _as_int(group["target"], f"layer {layer} target"))


def _check(plan: MergePlan) -> None:
    """The one door: every rule of DESIGN section 3."""
    if not isinstance(plan.model, str) or not plan.model:
        raise PlanError(f"plan model is {plan.model!r}; it must be a model name")
    try:
        object.__setattr__(plan, "image_size", image_size_pair(plan.image_size))
    except ValueError as error:
        raise PlanError(f"plan {error}") from None
    spare = int(any(plan.layers.values()))  # a plan that merges has a token on each side of the class token; an empty one need not
    for name, low, high in (("seqlen", 2 + spare, MAX_TOKENS), ("depth", 1, 1024)):
        value = _as_int(getattr(plan, name), name)
        if not low <= value <= high:
            raise PlanError(f"plan {name} is {value}; it must be {low}..{high}")
    if not spare <= _as_int(plan.cls_index, "cls_index") <= plan.seqlen - 1 - spare:
        raise PlanError(f"plan cls_index is {plan.cls_index}; with {plan.seqlen} tokens it must be {spare}..{plan.seqlen - 1 - spare}")
    if plan.weights not in WEIGHT_MODES:
        raise PlanError(f"plan weights are {plan.weights!r}; choose from {', '.join(WEIGHT_MODES)}")
    if not isinstance(plan.proportional_decay, bool):
        raise PlanError(f"plan proportional_decay is {plan.proportional_decay!r}; it must be true or false")
    length, cls = plan.seqlen, plan.cls_index
    for layer in sorted(plan.layers):
        groups = plan.layers[layer]
        if not 0 <= layer < plan.depth:
            raise PlanError(f"plan merges before layer {layer}; the model has layers 0..{plan.depth - 1}")
        if layer == 0 and groups:
            raise PlanError("plan merges before layer 0; its weights come from the layer before, so the first merge is before layer 1")
        used: set[int] = set()
        for group in groups:
            _check_group(layer, group, length, cls, used)
        gone = {source for group in groups for source in group.sources}
        left, right = sum(source < cls for source in gone), sum(source > cls for source in gone)
        if cls - left < 1 or length - 1 - cls - right < 1:
            raise PlanError(
                f"plan layer {layer}: {cls - left} tokens would stay before the class token and {length - 1 - cls - right} after it; "
                "at least one must stay on each side"
            )
        length, cls = length - len(gone), cls - left
    wanted = {layer: plan.removed(layer) for layer in plan.layers if plan.removed(layer)}
    if plan.weights == "constant":
        given = {layer: len(values) for layer, values in (plan.constants or {}).items() if values}
        if given != wanted:
            raise PlanError(f"plan constants count {given} sources, the layers {wanted}; calibrate: stm.calibrate_constants, or choose other weights")
    elif plan.constants is not None:
        raise PlanError(f"plan has constants but its weights are {plan.weights!r}; drop them or use weights 'constant'")


def _check_group(layer: int, group: Group, length: int, cls: int, used: set[int]) -> None:
    where = f"plan layer {layer}, target {group.target}"
    if not group.sources:
        raise PlanError(f"{where}: no sources; drop the group")
    for position in (*group.sources, group.target):
        if not 0 <= position < length:
            raise PlanError(f"{where}: position {position} does not exist; the layer gets tokens 0..{length - 1}")
        if position == cls:
            raise PlanError(f"{where}: position {position} is the class token, which never merges")
        if position in used:
            raise PlanError(f"{where}: position {position} is in two groups or twice in one; groups are disjoint")
        used.add(position)
    if list(group.sources) != sorted(group.sources):
        raise PlanError(f"{where}: sources {list(group.sources)} are not ascending")
    for source in group.sources:
        outer = source < group.target < cls or source > group.target > cls
        if not outer:
            raise PlanError(f"{where}: source {source} is not on the outer side of its target (class token at {cls}); merge towards the class token")


# --- generators -------------------------------------------------------------------------------------------------------

Schedule = Mapping[int, tuple[int, int]]
"""layer -> tokens removed left and right of the class token."""


@dataclass(frozen=True)
class Preset:
    """k tokens a side and layer from layer 1 until `removed` are gone, for 197 tokens (facts: paper's printed FLOPs)."""

    k: int
    removed: int


PRESETS = {
    "stm-15": Preset(1, 46),  # before layers 1..23: 151 left
    "stm-20": Preset(2, 44),  # before layers 1..11: 153 left
    "stm-30": Preset(2, 60),  # before layers 1..15: 137 left
    "stm-40": Preset(2, 79),  # 118 left
}
_REFERENCE_SEQLEN = 197


def _room(config: VimConfig, one_sided: bool) -> list[int]:
    """Tokens that may go left and right of the class token: a side keeps one at least."""
    return [max(0, config.cls_index - 1), 0 if one_sided else max(0, config.seqlen - 2 - config.cls_index)]


def _take(room: list[int], count: int) -> tuple[int, int]:
    """So many tokens from both sides alike, the odd one from the left; where a side has no more the other goes on. Takes them off `room`."""
    left = min(room[0], (count + 1) // 2)
    right = min(room[1], count - left)
    left = min(room[0], count - right)
    room[0], room[1] = room[0] - left, room[1] - right
    return left, right


def constant_schedule(config: VimConfig, k: int, removed: int, *, one_sided: bool = False) -> dict[int, tuple[int, int]]:
    """Remove k tokens a side before each layer from layer 1 until `removed` are gone.

    The odd remainder comes from the left. A side keeps one token at least; when it runs out the other goes on.

    Raises:
        PlanError: the sides or the layers do not hold so many tokens.
    """
    if not removed:
        return {}
    room = _room(config, one_sided)
    if removed > sum(room):
        raise PlanError(
            f"{removed} of {config.seqlen} tokens cannot be removed: with one token kept a side{' (left side only)' if one_sided else ''} "
            f"at most {sum(room)} can; lower the rate"
        )
    if removed and config.depth < 2:
        raise PlanError(f"{config.name!r} has {config.depth} layer; the first merge is before layer 1")
    if removed and 2 * k * (config.depth - 1) < removed:
        k = math.ceil(removed / (2 * (config.depth - 1)))
    schedule: dict[int, tuple[int, int]] = {}
    for layer in range(1, config.depth):
        if not removed:
            break
        schedule[layer] = _take(room, min(2 * k, removed))
        removed -= sum(schedule[layer])
    if removed:
        raise PlanError(f"{removed} tokens more than {config.depth - 1} layers can merge at {k} a side; lower the rate")
    return schedule


def rate_schedule(config: VimConfig, rate: float, *, one_sided: bool = False) -> dict[int, tuple[int, int]]:
    """Remove round(rate * seqlen) tokens in all, k = 1 a side and layer up to rate 0.15 else 2, times seqlen / 197."""
    if not isinstance(rate, int | float) or isinstance(rate, bool) or not 0 <= rate < 1:
        raise PlanError(f"rate is {rate!r}; it is the share of tokens removed by the last layer, 0 <= rate < 1")
    k = max(1, round((1 if rate <= 0.15 else 2) * config.seqlen / _REFERENCE_SEQLEN))
    return constant_schedule(config, k, round(rate * config.seqlen), one_sided=one_sided)


def preset_schedule(config: VimConfig, name: str, *, one_sided: bool = False) -> dict[int, tuple[int, int]]:
    """A preset's schedule; k and the count scale with seqlen / 197."""
    preset = PRESETS[name]
    scale = config.seqlen / _REFERENCE_SEQLEN
    return constant_schedule(config, max(1, round(preset.k * scale)), round(preset.removed * scale), one_sided=one_sided)


def aligned_schedule(config: VimConfig, schedule: Schedule, multiple: int) -> dict[int, tuple[int, int]]:
    """The schedule that leaves a multiple of `multiple` tokens wherever it merges: in each layer the one nearest to what
    the given schedule leaves, the larger of two. Layers where that takes no token merge nothing. Both sides give the same,
    the left one the odd token, unless the given schedule takes from the left alone.

    Kernels work on tokens in pieces, so a few tokens over a multiple can cost as much as the next one.

    Raises:
        PlanError: no multiple leaves a token on each side of the class token, or none is near enough for any merge.
    """
    if isinstance(multiple, bool) or not isinstance(multiple, int) or multiple < 1:
        raise PlanError(f"align is {multiple!r}; it is a number of tokens, 1 or more")
    room = _room(config, one_sided=not any(right for _, right in schedule.values()))
    wanted = left = config.seqlen
    aligned: dict[int, tuple[int, int]] = {}
    for layer in sorted(schedule):
        wanted -= sum(schedule[layer])
        take = left - (2 * wanted + multiple) // (2 * multiple) * multiple
        if take <= 0:
            continue
        if take > sum(room):
            raise PlanError(
                f"align {multiple}: before layer {layer} {left - take} tokens would be left, and both sides must keep one; take a smaller multiple"
            )
        aligned[layer] = _take(room, take)
        left -= take
    if not aligned and wanted < config.seqlen:
        raise PlanError(
            f"align {multiple}: {config.seqlen - wanted} of {config.seqlen} tokens are to go, and what is left is nearer to "
            f"{multiple * math.ceil(config.seqlen / multiple)} than to a multiple below; take a smaller one"
        )
    return aligned


def make_plan(
    config: VimConfig,
    *,
    rate: float | None = None,
    preset: str | None = None,
    schedule: Schedule | None = None,
    rule: str = "edge",
    weights: str = "hsp",
    proportional_decay: bool = False,
    align: int = 1,
) -> MergePlan:
    """Make a plan from one of rate, preset or schedule, with a position rule.

    `align` leaves a multiple of so many tokens after each merge (`aligned_schedule`), within half of it of what would be
    left without: fewer and larger steps.

    Rules: `edge` folds the k outermost tokens of each side into the next one inward, at every layer anew (the only
    reading under which the paper's eq. 20 is exact); `frontier` merges successive untouched pairs from outside
    inward; `spread` evenly spaced pairs; `one_sided` is `edge` with every source on the left (ablation).

    Raises:
        PlanError: an unknown rule or preset, or a schedule that does not fit.
    """
    if sum(option is not None for option in (rate, preset, schedule)) > 1:
        raise PlanError("give one of rate, preset or schedule, not several")
    if rule not in RULES:
        raise PlanError(f"no plan rule {rule!r}; choose from {', '.join(RULES)}")
    if preset is not None and preset not in PRESETS:
        raise PlanError(f"no plan preset {preset!r}; choose from {', '.join(PRESETS)}, or give a plan file")
    one_sided = rule == "one_sided"
    if one_sided and schedule is not None and any(right for _, right in schedule.values()):
        raise PlanError("rule 'one_sided' merges on the left only; its schedule has counts on the right: use rule 'edge'")
    if schedule is None:
        if preset is not None:
            schedule = preset_schedule(config, preset, one_sided=one_sided)
        else:
            schedule = rate_schedule(config, rate or 0.0, one_sided=one_sided)
    if align != 1:
        schedule = aligned_schedule(config, schedule, align)
    side_rule = {"edge": _edge, "one_sided": _edge, "frontier": _frontier, "spread": _spread}[rule]
    # A side is a list of marks, outermost token first; a mark is how often a token has been a target.
    sides = [[0] * config.cls_index, [0] * (config.seqlen - 1 - config.cls_index)]
    layers: dict[int, tuple[Group, ...]] = {}
    for layer in sorted(schedule):
        groups: list[Group] = []
        length = len(sides[0]) + len(sides[1]) + 1
        for side, count in enumerate(schedule[layer]):
            for sources, target in side_rule(sides[side], count):
                positions = [*sources, target] if side == 0 else [length - 1 - p for p in (*sources, target)]
                groups.append(Group(tuple(sorted(positions[:-1])), positions[-1]))
        if groups:
            layers[layer] = tuple(sorted(groups, key=lambda group: group.target))
    return MergePlan.of(config, layers, weights=weights, proportional_decay=proportional_decay)


def _edge(side: list[int], count: int) -> list[tuple[list[int], int]]:
    if not count:
        return []
    del side[:count]
    return [(list(range(count)), count)]


def _merge_pairs(side: list[int], starts: Sequence[int]) -> list[tuple[list[int], int]]:
    """Merge start -> start + 1 for each start, and mark the targets."""
    for start in starts:
        side[start + 1] += 1
    for start in sorted(starts, reverse=True):
        del side[start]
    return [([start], start + 1) for start in starts]


def _frontier(side: list[int], count: int) -> list[tuple[list[int], int]]:
    if count > len(side) // 2:
        raise PlanError(f"rule 'frontier': {count} pairs need {2 * count} tokens, the side has {len(side)}; lower the rate or use 'edge'")
    level = min(side) if side else 0
    while True:
        starts: list[int] = []
        position = 0
        while position + 1 < len(side) and len(starts) < count:
            if side[position] <= level and side[position + 1] <= level:
                starts.append(position)
                position += 2
            else:
                position += 1
        if len(starts) == count:
            return _merge_pairs(side, starts)
        level += 1  # every untouched pair is used: start again from outside, with tokens that were targets once


def _spread(side: list[int], count: int) -> list[tuple[list[int], int]]:
    if count > len(side) // 2:
        raise PlanError(f"rule 'spread': {count} pairs need {2 * count} tokens, the side has {len(side)}; lower the rate or use 'edge'")
    return _merge_pairs(side, [index * len(side) // count for index in range(count)])


def resolve_plan(config: VimConfig, plan: MergePlan | str | os.PathLike[str] | None, *, weights: str | None = None) -> MergePlan | None:
    """Turn what a user may pass as `plan` (a plan, a preset name, a path, None) into a plan that fits the model."""
    if plan is None:
        return None
    if not isinstance(plan, MergePlan):
        if isinstance(plan, str) and plan in PRESETS:
            plan = make_plan(config, preset=plan, weights=weights or "hsp")
        elif isinstance(plan, str) and not Path(plan).exists() and not plan.endswith(".json") and os.sep not in plan:
            raise PlanError(f"no plan preset or file {plan!r}; presets: {', '.join(PRESETS)}; or make a file: `stm plan -o plan.json`")
        else:
            plan = MergePlan.load(plan)
    plan.check_fits(config)
    return plan
