"""The pipeline on a real Prefect server: everything runs, finished stages are skipped, changes are refused."""

import json
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from functa.flows.config.load import load_config
from functa.flows.config.schema import PipelineConfig
from functa.flows.ledger import Ledger
from functa.storage.runs.stage_records import StageConflict, read_record
from tests.helpers.flows.tiny_config import TINY

pytestmark = pytest.mark.server
PROJECT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def root(prefect_server: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root in which the tiny pipeline has run."""
    folder = tmp_path_factory.mktemp("pipeline") / "root"
    run(folder)
    return folder


@pytest.fixture
def copy(root: Path, tmp_path: Path) -> Path:
    """A copy of the root that a test may change."""
    return Path(shutil.copytree(root, tmp_path / "root"))


def config(*overrides: str) -> PipelineConfig:
    return load_config("digits", [*TINY, *overrides])


def run(root: Path, *overrides: str, from_root: Path | None = None) -> dict:  # type: ignore[type-arg]
    from functa.flows.pipeline import pipeline

    return pipeline(str(root), config=config(*overrides), from_root=None if from_root is None else str(from_root))


def stamps(folder: Path) -> dict[str, int]:
    """Return when each file below was last written."""
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


def starts(root: Path) -> dict[str, str]:
    """Return when each stage last started: a skipped stage keeps its time."""
    return {p.stem: p.read_text() for p in (root / "stages").glob("*.json")}


def rerun(root: Path, *overrides: str) -> set[str]:
    """Run the pipeline; return the stages that were not skipped."""
    before = starts(root)
    run(root, *overrides)
    after = starts(root)
    return {stage for stage in after if after[stage] != before.get(stage)}


def test_every_figure_is_in_metrics_json(root: Path) -> None:
    metrics = json.loads((root / "metrics.json").read_text())
    assert {
        "psnr_test", "psnr_test_pooled", "psnr_test_clamped", "psnr_pca_patch", "psnr_pca_image", "psnr_by_bits",
        "mae_255", "top1_test", "ece", "label_agreement", "probe_top1", "sampling", "fd", "fd_reconstruction",
        "fd_test", "fd_noise", "fd_reference", "fd_protocol", "bits_per_dim", "rows", "bad_inputs",
        "encode_images_per_s", "meta_images_per_s", "seconds_by_stage", "parameters",
        "fingerprint", "versions",
    } <= metrics.keys()  # fmt: skip
    assert metrics["rows"] == 400
    dimensions = {"classifier": 64, "latent": 32, "wavelet": 16}  # of images of 8x8, too small for the network
    assert set(metrics["fd"]) == set(metrics["fd_test"]) == set(dimensions)
    assert metrics["fd_reference"] == {
        "images": "train", "count": 200, "samples": 100, "test": 100, "dimensions": dimensions,
        "subset": dict.fromkeys(dimensions, 100),
    }  # fmt: skip
    assert metrics["sampling"] == {
        "sampler": "ddpm", "sampling_steps": 4, "guidance": 1.0, "variance": "fixed_large", "clip": 4.0,
    }  # fmt: skip
    for key in ("kd", "precision", "recall", "label_agreement", "probe_top1"):
        assert set(metrics[key]) == set(dimensions)
    assert metrics["duplicates"] == 0
    assert set(metrics["accuracy_by_class"]) == {str(digit) for digit in range(10)}
    assert metrics["top5_test"] >= metrics["top1_test"]
    assert "fid" not in metrics  # no weights were given
    assert metrics["psnr_by_bits"]["8"] == pytest.approx(metrics["psnr_by_bits"]["32"], abs=0.5)
    assert metrics["psnr_by_bits"]["4"] < metrics["psnr_by_bits"]["32"]


def test_the_run_folder_holds_what_the_root_shows(root: Path) -> None:
    (folder,) = (root / "runs").iterdir()
    for name in ("metrics.json", "report.html"):
        assert (folder / name).read_bytes() == (root / name).read_bytes()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert {row["stage"] for row in rows} == {"meta_train", "classifier", "diffusion", "pixel_classifier"}
    assert (folder / "config.yaml").exists()
    assert {p.name for p in (folder / "images").iterdir()} >= {
        "reconstructions.png", "samples.png", "confusion.svg", "reliability.svg", "classes.csv", "generation.csv",
    }  # fmt: skip
    assert [p.name for p in (folder / "features").iterdir()] == ["normalizer.json"]  # moments were merged


def test_the_report_is_one_file_without_remote_parts(root: Path) -> None:
    class Links(HTMLParser):
        found: list[str] = []

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            self.found += [value or "" for name, value in attrs if name in ("src", "href")]
            assert tag != "script"

    parser = Links()
    parser.feed((root / "report.html").read_text())
    assert all(link.startswith(("data:", "#")) for link in parser.found)


def test_an_operator_sees_the_stages_and_the_artifacts(root: Path) -> None:
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        runs = client.read_flow_runs()
        artifacts = {artifact.key for artifact in client.read_artifacts()}
        states = {run.name: run.state_name for run in runs}
    names = ("pipeline", "meta-train", "encode", "train-classifier", "train-diffusion", "evaluate")
    assert {f"{name} digits": "Completed" for name in names}.items() <= states.items()
    assert {
        "metrics", "lineage", "reconstructions", "samples", "report", "functaset",
        "meta-train-progress", "classifier-progress", "diffusion-progress",
    } <= artifacts  # fmt: skip


def test_a_second_run_changes_nothing(copy: Path) -> None:
    before = stamps(copy)
    run(copy)
    assert stamps(copy) == before


def test_the_command_reports_an_up_to_date_root_without_a_server_or_torch(copy: Path) -> None:
    code = (
        "import sys; from functa.flows.cli.main import _guarded; status = _guarded(sys.argv[1:], False); "
        "assert not {'torch', 'prefect', 'zarr'} & set(sys.modules), 'something heavy was loaded'; sys.exit(status)"
    )
    sets = [part for override in TINY for part in ("--set", override)]
    done = subprocess.run(
        [sys.executable, "-c", code, "run", "digits", *sets, "--root", str(copy)],
        cwd=PROJECT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "everything is up to date" in done.stdout


@pytest.mark.parametrize(
    ("output", "stage"),
    [
        pytest.param("checkpoints/classifier", "train_classifier", marks=pytest.mark.slow),
        ("checkpoints/field", "meta_train"),
        ("functaset.zarr", "encode"),
        pytest.param("report.html", "evaluate", marks=pytest.mark.slow),
    ],
)
def test_after_deleting_an_output_only_its_stage_runs(copy: Path, output: str, stage: str) -> None:
    """Its new output is the same bit for bit, so no stage that reads it runs."""
    place = copy / output
    shutil.rmtree(place) if place.is_dir() else place.unlink()
    assert rerun(copy) == {stage}


@pytest.mark.slow
def test_a_failure_after_the_features_does_not_compute_them_again(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over a large reference they are the longest part of an evaluation; once it has finished, they are deleted."""
    from functa.flows.stages import evaluate
    from functa.storage.errors import StorageError
    from functa.tasks.evaluation.generation import features, memorization

    def fail(*_: object) -> None:
        raise StorageError("lost")

    (copy / "report.html").unlink()
    computed = []
    real = features.gather
    monkeypatch.setattr(features, "gather", lambda job, *rest: computed.append(job.kind) or real(job, *rest))
    with monkeypatch.context() as patch:
        patch.setattr(memorization, "measure", fail)
        with pytest.raises(StorageError, match="lost"):
            evaluate(str(copy), config=config())
    assert set(computed) == set(features.KINDS)
    computed.clear()
    evaluate(str(copy), config=config())
    assert computed == []
    assert [path.name for path in copy.glob("runs/*/features/*")] == ["normalizer.json"]


@pytest.mark.faults
def test_a_changed_key_is_refused_by_name_and_touches_nothing(copy: Path) -> None:
    before = stamps(copy)
    with pytest.raises(StageConflict, match=r"diffusion.learning_rate: 0.002 -> 0.001.*choose another --root"):
        run(copy, "diffusion.learning_rate=1e-3")
    assert stamps(copy) == before


@pytest.mark.slow
def test_another_root_takes_over_what_still_fits(root: Path, tmp_path: Path) -> None:
    before, other = stamps(root), tmp_path / "other"
    changes = ["diffusion.learning_rate=1e-3", "evaluation.memorization=null"]
    run(other, *changes, from_root=root)
    assert stamps(root) == before
    assert not (other / "functaset.zarr").exists()
    assert not (other / "checkpoints" / "field").exists()
    assert (other / "checkpoints" / "diffusion").exists()
    ledger = Ledger(config(*changes), str(other))
    field = read_record(ledger.location, "meta_train")
    assert field is not None
    assert ledger.output(field) == str(root / "checkpoints" / "field")
    metrics = [json.loads((place / "metrics.json").read_text()) for place in (root, other)]
    assert metrics[0]["psnr_test"] == metrics[1]["psnr_test"]
    assert metrics[0]["fd"] != metrics[1]["fd"]
    assert [bool({"distinct", "memorized"} & each.keys()) for each in metrics] == [True, False]
    assert ["Memorisation" in (place / "report.html").read_text() for place in (root, other)] == [True, False]


def test_a_stage_without_its_input_names_the_command_to_run_first(tmp_path: Path, prefect_server: None) -> None:
    from functa.flows.ledger import MissingInput
    from functa.flows.stages import encode

    with pytest.raises(MissingInput, match="run `functa meta-train digits` first"):
        encode(str(tmp_path / "empty"), config=config())
