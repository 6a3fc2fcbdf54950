"""Sweeps that really run: what is shared is made once, failures are named, a killed one goes on; gate; compare."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from functa.flows.config.load import load_config
from functa.flows.sweep.plan import plan_sweep
from functa.flows.sweep.results import SweepFailed, SweepState
from functa.storage.runs.stage_records import StageConflict
from tests.helpers.flows.command import here
from tests.helpers.flows.prefect_server import PROJECT, serving
from tests.helpers.flows.tiny_config import TINY

pytestmark = [pytest.mark.server, pytest.mark.slow]

ENCODED = [*TINY, "classifier=null", "diffusion=null"]
BITS = "encode.quantization.bits=8,2"
METRICS = ["psnr_test", "bits_per_dim"]


def run(root: Path, over: str = BITS, metrics: list[str] = METRICS, **how: Any) -> dict[str, Any]:
    from functa.flows.sweep.flow import sweep

    return sweep(str(root), preset="digits", overrides=ENCODED, over=[over], metrics=metrics, **how)


def commanded(root: Path, *extra: str) -> list[str]:
    sets = [word for text in ENCODED for word in ("--set", text)]
    metrics = [word for metric in METRICS for word in ("--metric", metric)]
    return ["sweep", "digits", *sets, "--over", BITS, *metrics, "--root", str(root), *extra]


def member_config(bits: int) -> list[str]:
    return [word for text in [*ENCODED, f"encode.quantization.bits={bits}"] for word in ("--set", text)]


@pytest.fixture(scope="module")
def failed(prefect_server: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """(root, error) of a sweep in which one member could not write, and then could."""
    root = tmp_path_factory.mktemp("sweep") / "root"
    blocked = root / plan_sweep("digits", ENCODED, [BITS]).members[0].folder
    blocked.parent.mkdir(parents=True)
    blocked.write_text("in the way")
    with pytest.raises(SweepFailed) as failure:
        run(root)
    kept = root / "first.json"
    shutil.copy(root / "sweep.json", kept)
    blocked.unlink()
    run(root)
    return root, str(failure.value)


@pytest.fixture(scope="module")
def root(failed: tuple[Path, str]) -> Path:
    """A sweep over two widths of a latent number, finished."""
    return failed[0]


def member(root: Path, bits: int) -> Path:
    return next(root.glob(f"members/digits.bits-{bits}-*"))


def test_a_failed_member_is_named_and_the_others_go_on(failed: tuple[Path, str]) -> None:
    root, error = failed
    assert error.startswith("1 of 2 members failed (digits.bits-8: ")
    assert "the same command tries them again" in error
    before = json.loads((root / "first.json").read_text())
    assert [each["state"] for each in before["members"]] == ["failed", "finished"]
    assert "psnr_test" not in before["settings"][0]["metrics"]
    after = json.loads((root / "sweep.json").read_text())
    assert [each["state"] for each in after["members"]] == ["finished"] * 2


def test_the_field_is_trained_once_and_each_width_encoded_from_it(root: Path) -> None:
    assert [place.name.rpartition("-")[0] for place in (root / "shared").iterdir()] == ["meta-train"]
    weights = [json.loads(path.read_text()) for path in root.glob("members/*/stages/meta_train.json")]
    assert len(weights) == 2
    assert {record["output"] for record in weights} == {str(next((root / "shared").iterdir()) / "checkpoints/field")}
    assert not list(root.glob("members/*/checkpoints/field"))
    assert len(list(root.glob("members/*/functaset.zarr"))) == 2


@pytest.mark.timeout(900)
@pytest.mark.parametrize("seeds", [1, 2])
def test_table_8_encodes_once_and_makes_the_fewer_bits_from_these_latents(
    seeds: int, prefect_server: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from functa.tasks.encoding import encode as encoding

    encoded: list[int] = []
    real = encoding.encode_images

    def counting(loop: Any, images: Any, batch: int) -> Any:
        encoded.append(len(images))
        return real(loop, images, batch)

    monkeypatch.setattr(encoding, "encode_images", counting)
    from functa.flows.sweep.flow import sweep

    more = ["classifier=null"] if seeds > 1 else ["classifier=null", "diffusion=null"]
    results = sweep(
        str(tmp_path), preset="digits", overrides=[*TINY, *more, "evaluation.quick=true"],
        over=["encode.quantization.bits=6,32,8"], metrics=["psnr_test", "bits_per_dim"], seeds=seeds,
    )  # fmt: skip
    assert [each["state"] for each in results["members"]] == ["finished"] * 3 * seeds
    assert sum(encoded) == 400  # every image once
    bits = [each["metrics"]["bits_per_dim"]["mean"] for each in results["settings"]]
    assert bits[0] < bits[2] < bits[1]


def test_the_table_holds_what_the_members_measured(root: Path) -> None:
    results = json.loads((root / "sweep.json").read_text())
    lines = [line.split(",") for line in (root / "sweep.csv").read_text().splitlines()]
    assert lines[0] == ["encode.quantization.bits", *METRICS]
    for bits, line, setting in zip((8, 2), lines[1:], results["settings"], strict=True):
        metrics = json.loads((member(root, bits) / "metrics.json").read_text())
        assert line == [str(bits), *(str(metrics[key]) for key in METRICS)]
        assert setting["values"] == {"encode.quantization.bits": str(bits)}
        assert setting["metrics"]["psnr_test"] == {
            "mean": metrics["psnr_test"], "sd": None, "values": [metrics["psnr_test"]],
        }  # fmt: skip
    assert "chosen on test" in results["splits"]["psnr_test"]
    page = (root / "report.html").read_text()
    assert "chosen on test" in page and "digits.bits-2" in page and page.count("<svg") == 2
    assert not re.search(r'(?:src|href)="(?!data:|#)', page)
    assert (root / "images/sweep_psnr_test.svg").stat().st_size > 0


def test_a_finished_sweep_is_shown_without_a_server_and_by_other_metrics(root: Path) -> None:
    before = {path: path.read_text() for path in root.glob("members/*/stages/*.json")}
    done = here(*commanded(root, "--metric", "psnr_by_bits.4"))
    assert done.returncode == 0, done.stderr
    assert "psnr_by_bits.4" in done.stdout and f"{root}/report.html" in done.stdout
    assert {path: path.read_text() for path in root.glob("members/*/stages/*.json")} == before
    results = (root / "sweep.json").read_text()
    wrong = here(*commanded(root, "--metric", "psnr_by_bits.3"))
    assert wrong.returncode == 2
    assert "--metric psnr_by_bits.3: no member measured such a number; did you mean psnr_by_bits.32" in wrong.stderr
    assert (root / "sweep.json").read_text() == results


def test_a_metric_that_only_some_members_have_is_shown_for_these(root: Path, tmp_path: Path) -> None:
    place = Path(shutil.copytree(root, tmp_path / "root"))
    first = member(place, 8) / "stages/evaluate.json"
    record = json.loads(first.read_text())
    del record["figures"]["psnr_by_bits"]["4"]
    first.write_text(json.dumps(record))
    done = here(*commanded(place, "--metric", "psnr_by_bits.4"))
    assert done.returncode == 0, done.stderr
    settings = json.loads((place / "sweep.json").read_text())["settings"]
    assert ["psnr_by_bits.4" in each["metrics"] for each in settings] == [False, True]
    assert "not measured" in (place / "images/sweep.csv").read_text()


def test_another_sweep_does_not_replace_the_results_in_a_root(root: Path) -> None:
    results = (root / "sweep.json").read_text()
    done = here(*commanded(root, "--set", "evaluation.bits=[8]"))
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert f"{root} holds another sweep (evaluation.bits: [8, 7, 6, 5, 4] -> [8]): choose another --root" in line
    for over, differs in (("evaluation.samples=50,60", "--over"), (BITS.replace("2", "4"), "")):
        plan = plan_sweep("digits", ENCODED, [over])
        if differs:
            with pytest.raises(StageConflict, match=differs):
                SweepState(plan, str(root), METRICS, "")
        else:
            SweepState(plan, str(root), METRICS, "")  # other values of the same key
    assert (root / "sweep.json").read_text() == results


def test_results_of_a_sweep_without_a_finished_member_may_be_replaced(root: Path, tmp_path: Path) -> None:
    results = json.loads((root / "sweep.json").read_text())
    plan = plan_sweep("digits", [*ENCODED, "evaluation.bits=[8]"], [BITS])
    for each in results["members"]:
        each["state"] = "failed"
    for text in (json.dumps(results), json.dumps(results | {"base": None}), "{", "[]"):
        (tmp_path / "sweep.json").write_text(text)
        SweepState(plan, str(tmp_path), METRICS, "")


def gated(root: Path, *gate: str) -> tuple[int, str]:
    stages = {path: path.read_text() for path in (root / "stages").iterdir()}
    sets = [word for text in gate for word in ("--set", text)]
    done = here("run", "digits", *member_config(8), *sets, "--root", str(root))
    assert {path: path.read_text() for path in (root / "stages").iterdir()} == stages
    return done.returncode, done.stderr.strip()


def test_the_gate_fails_a_finished_run_and_names_figure_threshold_and_report(root: Path, tmp_path: Path) -> None:
    place = Path(shutil.copytree(member(root, 8), tmp_path / "root"))
    psnr = json.loads((place / "metrics.json").read_text())["psnr_test"]
    assert gated(place, f"gate.min_psnr={psnr - 1}") == (0, "")
    assert "Passed." in (place / "report.html").read_text()
    status, line = gated(place, "gate.min_psnr=90", "gate.max_fid=5")
    assert status == 1
    assert line == (
        f"functa: psnr_test {psnr:.4g} dB is below gate.min_psnr 90 dB; fid was not measured, but gate.max_fid 5 asks "
        f"for it; report: {place}/report.html"
    )
    assert "FAILED" in (place / "report.html").read_text()


def test_the_pipeline_fails_by_its_gate_after_everything_was_done(root: Path, tmp_path: Path) -> None:
    from functa.flows.gate import GateFailed
    from functa.flows.pipeline import pipeline

    place = Path(shutil.copytree(member(root, 2), tmp_path / "root"))
    config = load_config("digits", [*ENCODED, "encode.quantization.bits=2", "gate.min_psnr=90"])
    with pytest.raises(GateFailed, match=r"is below gate\.min_psnr 90 dB; report: "):
        pipeline(str(place), config=config)
    assert json.loads((place / "stages/evaluate.json").read_text())["state"] == "finished"


def test_compare_shows_what_differs_and_lays_curves_over_each_other(root: Path, tmp_path: Path) -> None:
    one, two, page = member(root, 8), member(root, 2), tmp_path / "compared.html"
    done = here("compare", str(one), str(two), "--out", str(page), "--json")
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert [run["name"] for run in results["runs"]] == ["digits.bits-8", "digits.bits-2"]
    expected = [json.loads((place / "metrics.json").read_text()) for place in (one, two)]
    assert results["metrics"]["psnr_test"] == [each["psnr_test"] for each in expected]
    assert results["metrics"]["psnr_by_bits.4"] == [each["psnr_by_bits"]["4"] for each in expected]
    assert "psnr_test" in results["differing"] and "psnr_pca_image" not in results["differing"]
    assert results["config"] == {"encode.quantization.bits": [8, 2]}
    text = page.read_text()
    assert "encode.quantization.bits" in text
    unequal, _, equal = text.partition("<details")  # figures that are equal are folded away
    assert "psnr_test" not in equal and unequal
    assert text.count("<svg") == 1 and "digits.bits-8</" in text  # the field's curve
    assert not re.search(r'(?:src|href)="(?!data:|#)', text)
    shown = here("compare", str(one), str(two))
    assert shown.returncode == 0 and "encode.quantization.bits" in shown.stdout


def test_compare_reads_a_moved_root_and_a_run_folder(root: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(member(root, 8), tmp_path / "moved"))
    run_folder = next((member(root, 2) / "runs").iterdir())
    results = json.loads(here("compare", str(moved), str(run_folder), "--json").stdout)
    assert results["config"] == {"encode.quantization.bits": [8, 2]}
    equal = here("compare", str(moved), str(moved))
    assert equal.returncode == 0 and "All settings are equal." in equal.stdout


@pytest.mark.parametrize(
    ("arguments", "status", "expected"),
    [
        (["{root}"], 2, "compare needs at least two roots"),
        (["{member}", "/no/such/root"], 1, "/no/such/root: has no metrics.json"),
        (["{root}", "{member}"], 1, "has no metrics.json"),
        (
            ["{member}", "{member}", "--out", "/no/such/folder/x.html"],
            1,
            "--out /no/such/folder/x.html: cannot be writt",
        ),
    ],
)
def test_compare_refuses_in_one_line(arguments: list[str], status: int, expected: str, root: Path) -> None:
    place = member(root, 8)
    done = here("compare", *(text.format(root=root, member=place) for text in arguments))
    assert done.returncode == status
    (line,) = done.stderr.splitlines()
    assert expected in line


GUIDANCE = [word for text in TINY for word in ("--set", text)] + [
    "--over", "diffusion.process.guidance=0,3", "--seeds", "2", "--metric", "fd.classifier", "--metric", "top1_test",
]  # fmt: skip


@pytest.mark.timeout(1800)
def test_a_killed_sweep_over_guidance_resumes_and_samples_from_models_trained_once(tmp_path: Path) -> None:
    root, code = tmp_path / "root", "from functa.flows.cli.main import main; main()"
    command = [sys.executable, "-c", code, "sweep", "digits", *GUIDANCE, "--root", str(root)]
    with (tmp_path / "log").open("w") as log:
        first = subprocess.Popen(command, cwd=PROJECT, stdout=log, stderr=log, start_new_session=True)
        deadline = time.monotonic() + 900
        while not list(root.glob("members/*/metrics.json")):
            assert first.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.2)
        os.killpg(first.pid, signal.SIGKILL)
        first.wait()
    trained = {path: path.stat().st_mtime_ns for path in root.glob("shared/*/checkpoints/*/weights.safetensors")}
    assert len(trained) == 5  # a field; two seeds of classifier and diffusion model
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    assert {path: path.stat().st_mtime_ns for path in trained} == trained
    trained_anew = list(root.glob("members/*/checkpoints/*/weights.safetensors"))
    assert {path.parent.name for path in trained_anew} <= {"pixel_classifier"} and len(trained_anew) <= 2
    results = json.loads((root / "sweep.json").read_text())
    assert results["seeded"] == "training_seed"
    for setting, guidance in zip(results["settings"], "03", strict=True):
        found = [json.loads(path.read_text()) for path in root.glob(f"members/*guidance-{guidance}.*/metrics.json")]
        values = [each["fd"]["classifier"] for each in found]
        assert len(set(values)) == 2  # a seed makes other models
        assert setting["metrics"]["fd.classifier"]["mean"] == pytest.approx(np.mean(values), rel=1e-12)
        assert setting["metrics"]["fd.classifier"]["sd"] == pytest.approx(np.std(values, ddof=1), rel=1e-9)
    assert results["settings"][0]["metrics"]["top1_test"] == results["settings"][1]["metrics"]["top1_test"]
    assert (root / "images/sweep_samples.png").stat().st_size > 0


@pytest.mark.timeout(1800)
def test_members_are_runs_of_the_deployment_on_workers(tmp_path_factory: pytest.TempPathFactory) -> None:
    with serving(tmp_path_factory.mktemp("up")) as served:
        root = served.root / "sweep"
        done = subprocess.run(
            [sys.executable, "-c", "from functa.flows.cli.main import main; main()", *commanded(root, "--deployment")],
            cwd=PROJECT, env=served.environment(), capture_output=True, text=True, timeout=900, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        runs = served.ask("flow_runs/filter", {"limit": 200})
        parent = next(each for each in runs if each["name"] == "sweep digits")
        assert parent["state_type"] == "COMPLETED"
        names = [each["name"] for each in runs if each["deployment_id"]]
        assert sorted(name for name in names if name.startswith("pipeline ")) == [
            f"pipeline digits.bits-{bits}" for bits in (2, 8)
        ]
        # The shared one, and each pipeline's own look at it.
        assert len([name for name in names if name.startswith("meta-train ")]) == 3
        assert len(list(root.glob("**/checkpoints/field"))) == 1
