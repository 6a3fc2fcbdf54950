"""The figures of metrics.json in words: human name, group, unit, meaning. An unknown key is shown as it is."""

import json
import math
from dataclasses import dataclass
from typing import Any

from functa.tasks.evaluation.catalogue import BY_SPACE, SPACES, described, groups
from functa.tasks.stage_table import STAGES

# Steps of a run that are no stages.
OTHER_STEPS = {"pixel_classifier": "Train the pixel classifier", "report": "Report"}


@dataclass(frozen=True)
class Figure:
    """One value of metrics.json, ready to show."""

    key: str
    group: str
    name: str
    value: str
    meaning: str


COUNTED = {  # how an inner key that is a number is written
    "psnr_by_step": "step {}", "psnr_by_more_steps": "step {}", "compression": "{} bits",
    "compression_jpeg": "quality {}", "compression_webp": "quality {}",
}  # fmt: skip

PERTURBATIONS = {
    "linear_r2": "R\u00b2 of a line", "stability_patches": "likeness between patches",
    "stability_images": "likeness between images", "mae_largest": "strongest entry", "mae_median": "median entry",
    "mae_lowest": "weakest entry",
}  # fmt: skip

INNER = {  # other inner keys of figures
    "bpp": "bits per pixel", "bpp_fixed": "bits per pixel, uncoded", "bpp_scan": "bits per pixel without headers",
    "bpp_with_field": "bits per pixel with the field's share",
    "bpp_unamortised": "bits per pixel with all of the field", "psnr": "PSNR", "psnr_8bit": "PSNR as 8-bit images",
    "by_step": "by inner step", "field_bytes": "bytes of the field", "field_shared_by": "images that share the field",
    "train": "training", "sampling_steps": "steps",
}  # fmt: skip

TABLED = {"accuracy_by_class": 20}  # keys with more values are left to their section's table


def figures(metrics: dict[str, Any]) -> list[Figure]:
    """Return every value of metrics.json in words, by group; None, which nobody measured, is left out."""
    listed = {key: v for key, v in metrics.items() if not isinstance(v, dict) or len(v) <= TABLED.get(key, len(v))}
    found = [figure for key, value in listed.items() for figure in _flatten(key, (), value)]
    order = groups()
    return sorted(found, key=lambda figure: order.index(figure.group))  # stable: the file's order within a group


def number(metrics: dict[str, Any], key: str, inner: str | None = None) -> float | None:
    """Return a finite number of metrics.json, or None where it was not measured."""
    value = metrics.get(key)
    if inner is not None:
        value = value.get(inner) if isinstance(value, dict) else None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def show(value: Any, unit: str = "plain") -> str:
    """Write a value with its unit, as a person reads it."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool) or value is None or not isinstance(value, int | float):
        return json.dumps(value, default=str, ensure_ascii=False)
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else ("\u221e" if value > 0 else "\u2212\u221e")
    if unit == "share":
        return f"{100 * value:.1f} %" if value in (0, 1) or 0.001 <= value <= 0.999 else f"{100 * value:.3g} %"
    if unit == "duration":
        return duration(value)
    if unit == "count":
        return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.1f}"
    if unit == "rate":
        return f"{_plain(value)} images/s"
    if unit == "exact":
        return str(value)
    if unit in ("plain", "text"):
        return _plain(value)
    return f"{value:.2f} {unit}"


def setting(value: Any) -> str:
    """Write a config value as a person reads it."""
    return "not set" if value is None or value == "" else show(value, "exact")


def flattened(section: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Return every value below a section with its dotted key."""
    found: list[tuple[str, Any]] = []
    for key, value in section.items():
        nested = isinstance(value, dict) and value
        found += flattened(value, f"{prefix}{key}.") if nested else [(f"{prefix}{key}", value)]
    return found


def duration(seconds: float) -> str:
    """Write seconds in words: 85.2 is '1 min 25 s'."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def short(name: str, length: int) -> str:
    """Write a name as chart text: nothing that a font cannot draw, cut to length."""
    shown = "".join(letter if letter.isprintable() else "?" for letter in name)
    return shown if len(shown) <= length else shown[: length - 1] + "\u2026"


def stage_name(stage: str) -> str:
    """Write a stage in words."""
    return STAGES[stage].label if stage in STAGES else OTHER_STEPS.get(stage, stage.replace("_", " "))


def _flatten(key: str, inner: tuple[str, ...], value: Any) -> list[Figure]:
    if isinstance(value, dict):
        return [figure for name, below in value.items() for figure in _flatten(key, (*inner, str(name)), below)]
    if value is None:
        return []
    about = described(key)
    name = ", ".join([about.name, *(_inner_name(key, part) for part in inner)])
    better = f" {about.better.capitalize()} is better." if about.better else ""
    meaning = f"{about.meaning}{better}"
    return [Figure(".".join((key, *inner)), about.group, name, show(value, about.unit), meaning)]


def _inner_name(key: str, part: str) -> str:
    if key == "psnr_by_bits":
        return "float32" if part == "32" else f"{part} bits"
    if part.isdigit() and key in COUNTED:
        return COUNTED[key].format(part)
    if key == "seconds_by_stage":
        return stage_name(part)
    if key in BY_SPACE:
        return SPACES.get(part, part)
    if key == "perturbation":
        return PERTURBATIONS.get(part, part)
    return INNER.get(part, part)


def _plain(value: float) -> str:
    if float(value).is_integer() or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"
