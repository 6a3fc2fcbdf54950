"""The quality gate: which of a run's figures reach their thresholds. Free of torch."""

import math
from dataclasses import dataclass
from typing import Any

# Key of the gate -> key of the figure, and its unit.
FIGURES = {
    "min_psnr": ("psnr_test", " dB"),
    "min_top1": ("top1_test", ""),
    "max_ece": ("ece", ""),
    "max_fd": ("fd.classifier", ""),
    "max_fd_latent": ("fd.latent", ""),
    "max_fd_wavelet": ("fd.wavelet", ""),
    "max_fd_efficientnet_lite0": ("fd.efficientnet_lite0", ""),
    "min_label_agreement": ("label_agreement.classifier", ""),
    "max_fid": ("fid", ""),
}


@dataclass(frozen=True)
class Verdict:
    """One threshold and the figure that it is set to."""

    key: str
    figure: str
    threshold: float
    measured: float | None
    unit: str

    @property
    def passed(self) -> bool:
        """Return whether the figure reaches it; one that was not measured, or is not a number, does not."""
        if self.measured is None:
            return False
        return self.measured >= self.threshold if self.key.startswith("min_") else self.measured <= self.threshold

    def explain(self) -> str:
        """Explain what is wrong: "psnr_test 21.3 dB is below gate.min_psnr 25 dB"."""
        wanted = f"gate.{self.key} {self.threshold:g}{self.unit}"
        if self.measured is None:
            return f"{self.figure} was not measured, but {wanted} asks for it"
        got = f"{self.figure} {_shown(self.measured, self.threshold)}{self.unit}"
        if math.isnan(self.measured):
            return f"{got} is no number, but {wanted} asks for it"
        return f"{got} is {'below' if self.key.startswith('min_') else 'above'} {wanted}"


def verdicts(gate: dict[str, Any], metrics: dict[str, Any]) -> list[Verdict]:
    """Judge every threshold that the config's gate section sets."""
    found = []
    for key, (figure, unit) in FIGURES.items():
        if gate.get(key) is not None:
            value = measured(metrics, figure)
            found.append(Verdict(key, figure, float(gate[key]), value, unit))
    return found


def measured(metrics: dict[str, Any], figure: str) -> float | None:
    """Return the number under a dotted name of metrics.json; None where it was not measured, or is none."""
    value: Any = metrics
    for part in figure.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _shown(value: float, threshold: float) -> str:
    """Write it short, but never so short that it looks like the threshold that it misses."""
    return next((text for text in (f"{value:.4g}", f"{value:.7g}") if float(text) != threshold), repr(value))
