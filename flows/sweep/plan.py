"""Plan a sweep: axes, the members' configs, and what members share. Imports neither torch nor Prefect."""

import itertools
import math
import random
import re
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from functa.flows.config.digests import (
    before_quantization,
    chain_digests,
    digest,
    seed_of,
    stage_config,
    stages_of,
)
from functa.flows.config.load import load_config
from functa.flows.config.overrides import full_key
from functa.flows.config.schema import ConfigError, PipelineConfig
from functa.flows.config.yaml_values import read_yaml

MAX_MEMBERS = 10_000

MAX_NAME = 64  # letters: a config's name has no more

OPENING, CLOSING = "[{(", "]})"


@dataclass(frozen=True)
class Axis:
    """One --over: a config key, or several that change together, and the values in turn, as they were written."""

    keys: tuple[str, ...]
    values: tuple[tuple[str, ...], ...]  # of each value: a text for every key

    @property
    def name(self) -> str:
        """Return the key as it is shown: "diffusion.timestep_ratio", or "field.spatial, field.channels"."""
        return ", ".join(self.keys)


@dataclass(frozen=True, eq=False)
class Member:
    """One run of the sweep."""

    values: tuple[str, ...]  # as shown, one for each axis
    seed: int | None  # None: the config's own
    config: PipelineConfig
    digests: dict[str, str]  # of each stage with all that it reads

    @property
    def name(self) -> str:
        """Return the member's name in messages, which its folder and its run have too."""
        return self.config.name

    @property
    def folder(self) -> str:
        """Return the member's folder below the sweep's root; other settings have another one."""
        return f"members/{self.name}-{self.digests['evaluate'][:8]}"


@dataclass(frozen=True)
class SweepPlan:
    """The members of a sweep, those of one setting behind each other."""

    preset: str  # the config's name
    axes: tuple[Axis, ...]
    seeded: str  # the config key that --seeds counts up ("seed, training_seed": both), or ""
    members: tuple[Member, ...]
    base: dict[str, Any]  # what all members have in common, flat: keys that decide results, without those of the axes

    @property
    def keys(self) -> list[str]:
        """Return the keys that the axes change, sorted."""
        return sorted(key for axis in self.axes for key in axis.keys)

    def float_member(self, member: Member) -> Member | None:
        """Return the member that has this one's latents at 32 bits, from which its own need not be encoded anew."""
        if member in self._float_members:
            return None
        return next((other for other in self._float_members if _latents(other) == _latents(member)), None)

    @cached_property
    def _float_members(self) -> list[Member]:
        return [member for member in self.members if member.config.encode.quantization.bits == 32]

    def shared(self) -> list[tuple[str, str, Member]]:
        """Return (stage, digest, one member) of each stage that several members need, inputs first."""
        found: list[tuple[str, str, Member]] = []
        stages = dict.fromkeys(stage for member in self.members for stage in stages_of(member.config))
        for stage in stages:
            counts = Counter(member.digests.get(stage, "") for member in self.members)
            first = {member.digests.get(stage, ""): member for member in reversed(self.members)}
            found += [(stage, name, first[name]) for name, count in counts.items() if name and count > 1]
        return found


def _latents(member: Member) -> tuple[str, dict[str, Any]]:
    """Return what decides a member's latents before they are quantised."""
    return member.digests["meta_train"], before_quantization(stage_config(member.config, "encode"))


def plan_sweep(
    preset: str, overrides: list[str], over: list[str], draws: int | None = None, seeds: int = 1
) -> SweepPlan:
    """Return every member's config, each as `functa run PRESET --set ...` would have it.

    All combinations of the axes' values, or `draws` of them, drawn by the config's seed; each `seeds` times. The
    quality gate is left out: a sweep looks for what is good, and its members need not be.
    Raises ConfigError for an unknown key, a value that the config refuses, and members that are the same run.
    """
    axes = tuple(_axis(text) for text in over)
    if not axes:
        raise ConfigError("a sweep needs an --over, such as --over diffusion.process.timestep_ratio=1,2,3")
    _refuse_keys_twice(axes)
    base = load_config(preset, overrides)
    settings = _settings(axes, base, draws)
    if len(settings) * seeds > MAX_MEMBERS:
        raise ConfigError(f"{len(settings) * seeds} members are more than {MAX_MEMBERS}: --random N draws some of them")
    if len(settings) * seeds < 2:
        raise ConfigError("a sweep of one member is a run: give --over more values, or --seeds")
    chosen = [_member(preset, overrides, axes, values, base.name) for values in settings]
    seeded = _seeded(chosen, base, axes) if seeds > 1 else {}
    members = [
        _member(preset, overrides, axes, values, base.name, {key: first + number for key, first in seeded.items()})
        for values in settings
        for number in range(seeds)
    ]
    _refuse_equals(members, axes)
    return SweepPlan(base.name, axes, ", ".join(seeded), tuple(members), _in_common(base, axes))


def _axis(text: str) -> Axis:
    """Parse KEY=V,V or KEY,KEY=[V,V],[V,V]; commas inside brackets and quotes do not separate values."""
    left, equals, right = text.partition("=")
    keys = tuple(full_key(key.strip()) for key in left.split(","))
    values = split_values(right)
    if not equals or not all(keys) or not values or not all(values):
        raise ConfigError(f"--over {text}: expected KEY=VALUE,VALUE, such as diffusion.process.timestep_ratio=1,2,3")
    if len(keys) == 1:
        return Axis(keys, tuple((value,) for value in values))
    groups = tuple(tuple(split_values(value[1:-1])) for value in values if value[0] == "[" and value[-1] == "]")
    if len(groups) != len(values) or any(len(group) != len(keys) for group in groups):
        raise ConfigError(
            f"--over {text}: {len(keys)} keys that change together need values such as "
            f"[{','.join(f'V{n}' for n in range(1, len(keys) + 1))}],[...]"
        )
    return Axis(keys, groups)


def split_values(text: str) -> list[str]:
    """Split a text at the commas outside brackets and quotes: "[1,2],[3,4]" are two values."""
    parts, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "\"'":
            quote = letter
        elif letter in OPENING:
            depth += 1
        elif letter in CLOSING:
            depth -= 1
        elif letter == "," and depth == 0:
            parts.append("")
            continue
        parts[-1] += letter
    return [part.strip() for part in parts]


def _refuse_keys_twice(axes: tuple[Axis, ...]) -> None:
    keys = [key for axis in axes for key in axis.keys]
    for key in keys:
        if keys.count(key) > 1:
            raise ConfigError(f"--over names '{key}' twice: give all its values at once")
        if key.partition(".")[0] in ("gate", "name", "paper", "provenance"):
            raise ConfigError(f"--over {key}: decides nothing that a run makes; sweep another key")


def _settings(axes: tuple[Axis, ...], base: PipelineConfig, draws: int | None) -> list[tuple[tuple[str, ...], ...]]:
    """Return the value of every axis for each setting. Draws are all different, in the grid's order."""
    sizes = [len(axis.values) for axis in axes]
    total = math.prod(sizes)
    if draws is None:
        if total > MAX_MEMBERS:
            raise ConfigError(f"{total} members are more than {MAX_MEMBERS}: --random N draws some of them")
        return list(itertools.product(*(axis.values for axis in axes)))
    if draws > total:
        raise ConfigError(f"--random {draws}, but the values given make {total} combinations")
    drawn = sorted(random.Random(base.seed).sample(range(total), draws))  # noqa: S311  a draw, not a secret
    found = []
    for number in drawn:
        setting = []
        for axis, size in zip(reversed(axes), reversed(sizes)):
            number, index = divmod(number, size)
            setting.append(axis.values[index])
        found.append(tuple(reversed(setting)))
    return found


def _member(
    preset: str,
    overrides: list[str],
    axes: tuple[Axis, ...],
    setting: tuple[tuple[str, ...], ...],
    base: str,
    seeded: dict[str, int] | None = None,
) -> Member:
    own = [f"{key}={text}" for axis, texts in zip(axes, setting) for key, text in zip(axis.keys, texts)]
    seed = next(iter((seeded or {}).values()), None)
    name = _name(base, own if seed is None else [*own, f"seed={seed}"])
    seeds = [f"{key}={number}" for key, number in (seeded or {}).items()]
    try:
        config = load_config(preset, [*overrides, *own, *seeds, "gate={}", f"name={name}"])
    except ConfigError as error:
        raise ConfigError(f"--over {' '.join(own)}: {str(error).removeprefix('--set ')}") from None
    values = tuple(", ".join(texts) for texts in setting)
    return Member(values, seed, config, chain_digests(config))


def _name(base: str, settings: list[str]) -> str:
    """Return a name such as digits.timestep_ratio-3.seed-1, valid for a config and a folder."""
    pairs = [(key.rpartition(".")[2], value) for key, _, value in (text.partition("=") for text in settings)]
    for parts in ([f"{key}-{value}" for key, value in pairs], [value for _, value in pairs]):
        name = re.sub(r"[^A-Za-z0-9_.-]+", "-", ".".join([base, *parts]))
        if len(name) <= MAX_NAME:
            return name
    return f"{name[: MAX_NAME - 9]}-{digest(settings)[:8]}"


def _seeded(members: list[Member], base: PipelineConfig, axes: tuple[Axis, ...]) -> dict[str, int]:
    """Return the keys that seeds count up, with their first values.

    `seed` where every setting meta-trains a field of its own, and a training_seed that the config gives too, or what
    is trained after the functaset would not vary; else training_seed alone, so that the field is shared.
    """
    key = "seed" if len({member.digests["meta_train"] for member in members}) > 1 else "training_seed"
    if any(name in ("seed", "training_seed") for axis in axes for name in axis.keys):
        raise ConfigError(f"--seeds counts {key} up: leave out either --seeds or the seed's --over")
    if key == "training_seed" and base.classifier is None and base.diffusion is None:
        raise ConfigError("--seeds: this config trains nothing after the functaset, and all members share that")
    if key == "training_seed":
        return {key: seed_of(base, "evaluate")}
    return {key: base.seed} | ({} if base.training_seed is None else {"training_seed": base.training_seed})


def _in_common(base: PipelineConfig, axes: tuple[Axis, ...]) -> dict[str, Any]:
    """Return the keys that decide the base's results, flat, without those of the axes: they identify the sweep."""
    flat = {key: value for stage in stages_of(base) for key, value in stage_config(base, stage).items()}
    flat |= {"seed": base.seed, "training_seed": seed_of(base, "evaluate")}
    changed = [key for axis in axes for key in axis.keys]
    return {key: value for key, value in flat.items() if not any(f"{key}.".startswith(f"{name}.") for name in changed)}


def _refuse_equals(members: list[Member], axes: tuple[Axis, ...]) -> None:
    """Raise ConfigError for members that are the same run: a value given twice, or a key without effect."""
    first: dict[str, Member] = {}
    for member in members:
        twin = first.setdefault(member.digests["evaluate"], member)
        if twin is not member:
            keys = ", ".join(axis.name for axis in axes)
            one, other = (" with ".join(each.values) for each in (twin, member))
            raise ConfigError(f"--over {keys}: {one} and {other} make the same run; give values that change its result")


def number_of(text: str) -> float | None:
    """Return a value as a number, for an axis of a plot; None for a word, a list, a truth value."""
    try:
        value: Any = read_yaml(text, Any)
        return None if isinstance(value, bool | list | dict) or value is None else float(value)
    except Exception:  # whatever YAML makes of it, it is no number
        return None
