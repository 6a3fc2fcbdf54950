"""Perturbation of real fields' latents: locality by kind of field, arrays and sections of grids and of vectors."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from functa.flows.config.load import load_config
from functa.flows.config.schema import ConfigError
from functa.storage.functaset.functaset import Functaset
from functa.tasks.evaluation import perturbation
from functa.tasks.evaluation.evaluator_input import EvaluationJob, Messages, read_arrays
from functa.tasks.inputs.latents import PlainRows
from functa.tasks.report.blocks import Drawing, ReportData, Sheet
from functa.tasks.report.files import page_files
from functa.tasks.report.page import write_report
from functa.tasks.report.sections import report_sections
from functa.tasks.report.sections.perturbation import section
from tests.helpers.flows.tiny_config import TINY
from tests.tasks.evaluation.generation.test_memorization import field_of, work

SMALL = [*TINY, "images.limit=40", "meta_train.steps=2", "encode.quantization.max_clip_fraction=0.1"]
KINDS = {
    "nearest": [],
    "bilinear": ["field.interpolation=bilinear", "field.coordinates=global"],
    "3x3": ["field.kernel=3"],
    "vector": ["field.spatial=1", "field.channels=32"],
}


def measured(kind: str, folder: Path) -> tuple[EvaluationJob, dict[str, Any]]:
    """Measure a field of this kind, hardly trained: the reach of a latent depends on the kind only."""
    overrides = [*SMALL, *KINDS[kind]]
    job = work(field_of(folder / "field", *overrides), folder, *overrides)
    evaluation = load_config("digits", [*overrides, "evaluation.perturbation.images=3"]).evaluation
    job = job.model_copy(update={"evaluation": evaluation})
    return job, perturbation.measure(job)


@pytest.fixture(scope="module")
def all_kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[EvaluationJob, dict[str, Any]]]:
    return {kind: measured(kind, tmp_path_factory.mktemp(kind)) for kind in KINDS}


def report(of: tuple[EvaluationJob, dict[str, Any]]) -> ReportData:
    job, figures = of
    arrays = {name: read_arrays(job.output, name) for name in ("perturbation", "latents")}
    return ReportData(title="t", metrics=figures, arrays=arrays)


def test_locality_is_one_for_nearest_less_where_patches_mix_and_least_for_vectors(all_kinds: Any) -> None:
    locality = {kind: figures["locality"] for kind, (_, figures) in all_kinds.items()}
    assert locality["nearest"] == 1.0
    assert locality["bilinear"] < 0.99 and locality["3x3"] < 0.99
    assert 1 / 16 < locality["vector"] < min(locality["bilinear"], locality["3x3"])


@pytest.mark.parametrize("kind", ["nearest", "vector"])
def test_progress_counts_to_its_end(kind: str, all_kinds: Any, tmp_path: Path) -> None:
    reported: list[tuple[str, int, int]] = []
    job = all_kinds[kind][0].model_copy(update={"output": str(tmp_path)})
    perturbation.measure(job, Messages(lambda *row: reported.append(row)))
    (total,) = {total for _, _, total in reported}
    assert [done for _, done, _ in reported] == list(range(1, total + 1))


def changed(job: EvaluationJob, output: Path, **settings: Any) -> EvaluationJob:
    assert job.evaluation.perturbation is not None
    own = job.evaluation.perturbation.model_copy(update=settings)
    return job.model_copy(
        update={"output": str(output), "evaluation": job.evaluation.model_copy(update={"perturbation": own})}
    )


def test_fewer_channels_are_perturbed_for_large_images_unless_their_number_is_given(
    monkeypatch: pytest.MonkeyPatch, all_kinds: Any, tmp_path: Path
) -> None:
    job = changed(all_kinds["vector"][0], tmp_path)
    perturbation.measure(job)
    assert len(read_arrays(job.output, "perturbation")["entries"]) == 32
    monkeypatch.setattr(perturbation, "PIXELS", 3 * 64 * 16)  # three images of 64 pixels, an entry moved once each
    perturbation.measure(job)
    assert len(read_arrays(job.output, "perturbation")["entries"]) == 16
    monkeypatch.setattr(perturbation, "PIXELS", 1000)
    perturbation.measure(job)
    assert len(read_arrays(job.output, "perturbation")["entries"]) == perturbation.LEAST_CHANNELS
    perturbation.measure(changed(job, tmp_path, channels=32))
    assert len(read_arrays(job.output, "perturbation")["entries"]) == 32


def test_the_channel_that_is_moved_everywhere_can_be_chosen(all_kinds: Any, tmp_path: Path) -> None:
    job, _ = all_kinds["nearest"]
    shown = {}
    for channel in (None, 0, 5):
        asked = changed(job, tmp_path / str(channel), show_channel=channel, channels=2)
        data = report((asked, perturbation.measure(asked)))
        shown[channel] = arrays = data.arrays["perturbation"]
        found = section(data)
        assert found is not None
        (sheet,) = (block for block in found.blocks if block.name == "perturbation_channel")
        assert isinstance(sheet, Sheet)
        assert sheet.title.startswith(f"Channel {int(arrays['shown'])} moved everywhere")
        assert sheet.note.startswith("The channel of median effect" if channel is None else "As asked for")
    assert [int(shown[channel]["shown"]) for channel in (0, 5)] == [0, 5]
    assert (shown[0]["channel"] != shown[5]["channel"]).any()
    assert (shown[5]["unperturbed"] == shown[0]["unperturbed"]).all()


def test_only_the_rows_that_are_perturbed_are_read(
    all_kinds: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, known = all_kinds["bilinear"]
    read: list[int] = []
    real = PlainRows.read
    monkeypatch.setattr(Functaset, "load", lambda *_: pytest.fail("a whole split was read"))
    monkeypatch.setattr(PlainRows, "read", lambda self, rows: read.append(len(rows)) or real(self, rows))
    assert perturbation.measure(job.model_copy(update={"output": str(tmp_path)})) == known
    assert read == [3]


def test_an_image_of_one_patch_has_no_locality(all_kinds: Any, tmp_path: Path) -> None:
    """It would be 1, as if the entry of a vector had a position."""
    job, known = all_kinds["vector"]
    one = job.evaluation.perturbation.model_copy(update={"grid": 1})
    evaluation = job.evaluation.model_copy(update={"perturbation": one})
    job = job.model_copy(update={"output": str(tmp_path), "evaluation": evaluation})
    figures = perturbation.measure(job)
    assert figures == {key: value for key, value in known.items() if key != "locality"}
    shown = section(report((job, figures)))
    assert shown is not None and "locality is left out" in shown.about


def test_the_spread_of_channels_is_that_of_the_stored_latents(all_kinds: Any) -> None:
    for kind, (job, figures) in all_kinds.items():
        z = Functaset.open(job.functaset).load("train").dequantized().astype(np.float64)
        arrays = read_arrays(job.output, "latents")
        np.testing.assert_allclose(arrays["mean"], z.mean((0, 1, 2)), atol=1e-6, err_msg=kind)
        np.testing.assert_allclose(arrays["sd"], z.std((0, 1, 2)), rtol=1e-4, err_msg=kind)
        assert figures["latent_sd"] == pytest.approx(np.sqrt(z.var(0).mean()), rel=1e-4)


def test_each_kind_of_latent_has_its_pictures(all_kinds: Any) -> None:
    grids, vectors = section(report(all_kinds["nearest"])), section(report(all_kinds["vector"]))
    assert grids is not None and vectors is not None
    names = [{block.name for block in found.blocks if isinstance(block, Sheet | Drawing)} for found in (grids, vectors)]
    assert names[0] == {"latent_channels", "perturbation_rmse", "perturbation_channel", "perturbation_position"}
    assert names[1] == {"latent_channels", "perturbation_entries", "perturbation_entries_shown"}
    job, figures = all_kinds["vector"]
    arrays = read_arrays(job.output, "perturbation")
    order = [figures["perturbation"][f"mae_{name}"] for name in ("largest", "median", "lowest")]
    assert order == sorted(order, reverse=True) and order[0] > order[2]
    assert arrays["mae"].max() == pytest.approx(order[0])
    shown = [np.abs(arrays[name].astype(float) - arrays["unperturbed"]).mean() for name in ("largest", "lowest")]
    assert shown[0] > shown[1]


def test_a_moved_position_changes_its_patch_alone_in_the_picture(all_kinds: Any) -> None:
    arrays = read_arrays(all_kinds["nearest"][0].output, "perturbation")
    change = arrays["position"] != arrays["unperturbed"]
    assert change[:, 4:, 4:].any() and not change[:, :4].any() and not change[:, :, :4].any()
    assert (arrays["channel"] != arrays["unperturbed"])[:, :4, :4].any()


def test_grids_and_vectors_make_a_report_and_an_older_run_still_does(all_kinds: Any) -> None:
    for kind in ("nearest", "vector"):
        data = report(all_kinds[kind])
        sections = report_sections(data)
        assert {"perturbation.csv", "latent_channels.svg"} <= page_files(sections).keys()
        assert 'id="perturbation"' in write_report(data, sections)
    without = dataclasses.replace(report(all_kinds["nearest"]), arrays={})
    assert section(without) is None


def test_strengths_that_perturb_nothing_are_refused() -> None:
    for strengths in ("[0,0.1]", "[-0.2,-0.1]"):
        with pytest.raises(ConfigError, match="give one above 0"):
            load_config("digits", [f"evaluation.perturbation.strengths={strengths}"])
