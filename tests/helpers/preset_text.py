"""The file of a preset as it was written, comments included."""

from pathlib import Path

PRESETS = Path(__file__).parents[2] / "flows" / "presets"


def preset_text(name: str) -> str:
    (path,) = PRESETS.rglob(f"{name}.yaml")
    return path.read_text()
