"""One interface for everything that the evaluation measures. Free of torch and matplotlib."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from functa.tasks.evaluation.evaluator_input import EvaluationJob, Messages
    from functa.tasks.report.blocks import ReportData, Section


@dataclass(frozen=True)
class Described:
    """A key of metrics.json in words."""

    group: str
    name: str
    unit: str
    """A suffix, or one of share (0 to 1), count, duration, rate, text, exact, plain."""
    meaning: str
    better: Literal["higher", "lower", ""] = ""
    split: Literal["test", "train", "samples", ""] = ""
    """The images it is measured on; samples: samples of the diffusion model, compared with reference images."""


# classifier and diffusion are trained models. The flow makes the next three: samples of the diffusion model, the
# features of these and of what they are compared with, and the draws of each class that Table 7 counts. Evaluators run
# side by side; one that reads what another has written names that one.
Input = Literal["classifier", "diffusion", "samples", "features", "draws", "reconstruction"]

OF_DIFFUSION = ("diffusion", "samples", "features", "draws")


@dataclass(frozen=True)
class Evaluator:
    """A part of the evaluation: a function that measures, and functions that draw sections of the report.

    A function is named as `module:function` and imported when it is called, so that the table costs no time to read.
    """

    name: str
    measure: str
    """Called with (EvaluationJob, Messages); returns figures by their keys in metrics.json."""
    sections: tuple[str, ...] = ()
    """Called with ReportData; each returns a Section, or None if there is nothing to show."""
    needs: tuple[Input, ...] = ()
    figures: Mapping[str, Described] = field(default_factory=dict)

    def run(self, job: "EvaluationJob", messages: "Messages") -> dict[str, Any]:
        """Measure, and leave arrays for the report in the run's folder."""
        return dict(_imported(self.measure)(job, messages))

    def draw(self, data: "ReportData") -> "list[Section]":
        """Return the sections for which this run has data."""
        return [section for name in self.sections if (section := _imported(name)(data)) is not None]


def _imported(reference: str) -> Callable[..., Any]:
    module, _, name = reference.partition(":")
    found: Callable[..., Any] = getattr(import_module(module), name)
    return found
