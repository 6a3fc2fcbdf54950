"""Members of a sweep, made by hand."""

from functa.tasks.report.compare.sweep import (
    SweepMember,
)


def member(value: float, *values: str, seed: int = 0, state: str = "finished") -> SweepMember:
    metrics = {} if state == "failed" else {"fd": {"latent": value}}
    return SweepMember("name", values, seed, "root", state, "broke" if state == "failed" else "", metrics)


def number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
