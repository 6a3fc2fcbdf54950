"""A table of the paper beside the figures of runs, row by row."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from functa.storage.config import ImagesConfig
from functa.storage.errors import StorageError
from functa.storage.images.sources import known_shape
from functa.storage.places.address import MAX_STAGE_BYTES, open_location, read_json
from functa.tasks.evaluation.catalogue import SPACES
from functa.tasks.report.compare.runs import ComparedRun
from functa.tasks.report.sections.figures import PAPER, beside, conditional, measured_as
from functa.tasks.report.words import number

OF_BITS = {32: (8.7, 0.2), 8: (9.0, 0.2), 7: (8.8, 0.2), 6: (9.2, 0.1)}  # Table 8: FID by bits, mean and sd of 3 seeds

PUBLIC = ("efficientnet_lite0", "wavelet")  # spaces that everybody can reproduce: shown where FID is


@dataclass(frozen=True)
class PaperRow:
    """A row of one of the paper's tables: what it is of, and its figures by their keys in PAPER."""

    latent: tuple[int, ...]
    interpolation: str
    kernel: int
    resolution: int | None
    figures: Mapping[str, float]
    bits: int | None = None  # None: whatever a run stores

    @property
    def name(self) -> str:
        """Return the latent in words."""
        described = ["x".join(map(str, self.latent)), self.interpolation if self.latent[0] > 1 else "vector"]
        described += ["3x3"] if self.kernel == 3 else []
        described += [] if self.bits is None else [f"{self.bits} bits"]
        return ", ".join(described)

    def fits(self, config: Mapping[str, Any]) -> bool:
        """Return whether a run's config is of this latent, by its shape, its map and the images' size."""
        field = config.get("field", {})
        shape = (*[field.get("spatial")] * field.get("axes", 2), field.get("channels"))
        same = shape == self.latent and (
            self.latent[0] == 1  # a vector is read at one position: nothing is interpolated
            or (field.get("interpolation"), field.get("kernel")) == (self.interpolation, self.kernel)
        )
        stored = config.get("encode", {}).get("quantization", {}).get("bits", 32)
        resolution = _resolution(config)
        return same and self.bits in (None, stored) and (resolution is None or resolution == self.resolution)


@dataclass(frozen=True)
class Line:
    """A figure of the paper and ours, in the paper's unit; None where there is none."""

    row: str
    key: str
    figure: str
    unit: str
    paper: float | None
    ours: float | None
    run: str = ""
    paper_sd: float | None = None
    sd: float | None = None

    @property
    def cells(self) -> tuple[str, str, str]:
        """Return the paper's figure, ours, and the difference as text; of several seeds with their sd."""
        paper, ours, difference = beside(self.paper, self.ours, self.unit)
        spread = [f" \u00b1 {sd:.1f}" if sd is not None else "" for sd in (self.paper_sd, self.sd)]
        return paper + spread[0], ours + spread[1], difference


def _resolution(config: Mapping[str, Any]) -> int | None:
    found: int | None = known_shape(ImagesConfig.model_validate(config["images"]))[0] if "images" in config else None
    return found


def lines_of(rows: Sequence[PaperRow], runs: Sequence[ComparedRun]) -> list[Line]:
    """Return a line for each figure of each row, and for each run that has measured it.

    Runs of a row that differ by their bits and seeds alone (Table 8) are one line: mean and sd. Raises StorageError
    for a run that belongs to no row.
    """
    for run in runs:
        if not any(row.fits(run.config) for row in rows):
            raise StorageError(
                f"{run.root}: its latent is in no row of this table; rows: {'; '.join(row.name for row in rows)}"
            )
    lines: list[Line] = []
    for row in rows:
        mine = [run for run in runs if row.fits(run.config)]
        for key, paper in row.figures.items():
            found = [(run, value) for run in mine if (value := measured_as(key, run.config, run.metrics)) is not None]
            lines += _of_seeds(row, key, paper, found) if row.bits is not None else _each(row, key, paper, found)
        lines += [line for run in mine for line in _public(row, run)]
    return lines


def _each(row: PaperRow, key: str, paper: float, found: list[tuple[ComparedRun, float]]) -> list[Line]:
    name, unit = PAPER[key]
    if not found:
        return [Line(row.name, key, name, unit, paper, None)]
    return [Line(row.name, key, name, unit, paper, value, run.name) for run, value in found]


def _of_seeds(row: PaperRow, key: str, paper: float, found: list[tuple[ComparedRun, float]]) -> list[Line]:
    name, unit = PAPER[key]
    values, spread = [value for _, value in found], OF_BITS[row.bits or 32][1]
    mean = statistics.fmean(values) if values else None
    sd = statistics.stdev(values) if len(values) > 1 else None
    seeds = f"{len(values)} seed{'s'[: len(values) != 1]}" if values else ""
    return [Line(row.name, key, name, unit, paper, mean, seeds, spread, sd)]


def _public(row: PaperRow, run: ComparedRun) -> list[Line]:
    """Return distances in spaces that need no download, which the paper has not; none where FID was measured."""
    found = {space: number(run.metrics, "fd", space) for space in PUBLIC if "fid" not in run.metrics}
    kind = "conditional" if conditional(run.config) else "unconditional"
    return [
        Line(row.name, f"fd.{space}", f"Fr\u00e9chet distance, {SPACES[space]}, {kind}", "", None, value, run.name)
        for space, value in found.items() if value is not None
    ]  # fmt: skip


def members(address: str) -> list[str]:
    """Return the roots of a sweep's finished members, or the address itself where it is no sweep's."""
    location = open_location(address)
    if not location.exists("sweep.json"):
        return [address]
    found = read_json(location, "sweep.json", MAX_STAGE_BYTES)["members"]
    return [str(member["root"]) for member in found if member["state"] == "finished"]
