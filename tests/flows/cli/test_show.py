"""The settings that `functa show` prints, and its estimates beside what a run really takes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from functa.flows.cli.show import HEADLINE, describe_run, print_run
from functa.flows.config.estimate import SHARE, START, START_ENCODING, STEP, stage_seconds
from functa.flows.config.load import load_config
from functa.flows.config.reference import SECTION, settings_reference
from functa.models.compute.compilation import has_compiler
from functa.models.field.cost import outer_memory
from functa.tasks.training_jobs import MetaTrainJob

PROJECT = Path(__file__).parents[3]
ROWS = {setting.key: setting for setting in settings_reference()}
# Memory of a meta-training beyond that of a small one that loaded the libraries: RSS before, peak after, in bytes.
MEASURE = """
import sys
from functa.tasks.training.meta_train import run
from functa.tasks.training_jobs import MetaTrainJob
small, large = (MetaTrainJob.model_validate_json(line) for line in sys.stdin)
def status(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) * 1024
run(small, lambda row: None)
open("/proc/self/clear_refs", "w").write("5")  # the peak is counted from here on
before = status("VmRSS:")
run(large, lambda row: None)
print(status("VmHWM:") - before)
"""
STEPS = ["meta_train.steps=2", "meta_train.warmup=0", "meta_train.batch=4", "meta_train.validation_images=0",
         "inner.compile=off", "dispatch.device=cpu", "field.width=16"]  # fmt: skip


def estimate(*overrides: str) -> dict[str, Any]:
    described: dict[str, Any] = describe_run(load_config("digits", list(overrides)))["estimate"]
    return described


def job(output: Path, *overrides: str) -> str:
    config = load_config("digits", list(overrides))
    return MetaTrainJob(
        seed=0, images=config.images, field=config.field, inner=config.inner, meta_train=config.meta_train,
        device="cpu", output=str(output), digest="d",
    ).model_dump_json()  # fmt: skip


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="no /proc to read a peak from")
@pytest.mark.parametrize(
    "resolution",
    [
        pytest.param(64, id="as-the-source-holds-them", marks=pytest.mark.slow),
        pytest.param(32, id="resized", marks=pytest.mark.slow),
    ],
)
def test_the_estimated_memory_is_what_a_process_takes(resolution: int, tmp_path: Path) -> None:
    rows = np.random.default_rng(0).integers(0, 256, (12_000, 64, 64, 3), dtype=np.uint8)  # 147 MB
    for split, part in (("train", rows[1000:]), ("test", rows[:1000])):
        np.savez(tmp_path / f"{split}.npz", images=part, labels=np.arange(len(part)) % 10)
    images = ["images.source=npz", f"images.location={tmp_path}", f"images.resolution={resolution}"]
    jobs = [job(tmp_path / "small", *STEPS), job(tmp_path / "large", *STEPS, *images)]
    child = subprocess.run(
        [sys.executable, "-c", MEASURE], input="\n".join(jobs), capture_output=True, text=True, check=True,
        cwd=PROJECT, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    measured, estimated = int(child.stdout), estimate(*STEPS, *images)["memory_bytes"]
    assert 0.75 * estimated < measured < 1.25 * estimated


def test_absent_images_are_left_out_and_that_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    images = ["images.source=npz", "images.location=nowhere", "images.resolution=8", "images.channels=1"]
    config = load_config("digits", [*images, "dispatch.devices=2"])
    print_run(describe_run(config))
    printed = capsys.readouterr().out
    assert "MB beside the libraries and the images, of which up to 4295 MB are kept in each of 2 processes" in printed
    print_run(describe_run(load_config("digits")))
    assert "MB beside the libraries; the latents" in capsys.readouterr().out
    assert "Encoding is not counted: the images are not there." in printed


def test_every_setting_is_printed_with_its_key_value_and_description(capsys: pytest.CaptureFixture[str]) -> None:
    described = describe_run(load_config("digits", ["classifier=null"]))
    print_run(described, everything=True)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    # A key's own line comes before those that its description goes on in.
    printed = {words[0]: words[1:] for words in reversed(lines) if words and words[0] in ROWS}
    # A section that may be null has a row of its own only where it is null.
    expected = {key for key, row in ROWS.items() if row.type != SECTION and not key.startswith("classifier.")}
    expected |= {"classifier"}
    assert expected <= set(printed)
    assert not [key for key in printed if key.startswith("classifier.")]
    assert printed["classifier"][:4] == ["null", "Null:", "no", "classifier"]
    assert printed["field.width"][:2] == ["64", ROWS["field.width"].description.split()[0]]


def test_the_estimate_comes_first_and_then_the_main_settings(capsys: pytest.CaptureFixture[str]) -> None:
    print_run(describe_run(load_config("digits")))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("Parameters:") and lines[1].startswith("Time on this machine")
    printed = [key for line in lines if (key := line.partition(" ")[0]) in ROWS]
    assert printed == [key for key in HEADLINE if key not in ("classifier", "diffusion")]  # they are not null
    assert lines[-1] == "--all shows every setting with what it accepts."
    assert len(lines) < 60


def test_choices_are_listed_as_in_the_reference(capsys: pytest.CaptureFixture[str]) -> None:
    print_run(describe_run(load_config("digits")), everything=True)
    words = " ".join(capsys.readouterr().out.split())
    assert f"One of: {ROWS['inner.compile'].type}." in words
    assert words.count("One of:") == sum(" | " in row.type for row in ROWS.values())


def test_an_absent_value_is_described_as_it_is_printed() -> None:
    assert not [row.key for row in ROWS.values() if "empty:" in row.description]


def test_only_presets_that_follow_the_paper_show_whose_choice_a_setting_is(capsys: pytest.CaptureFixture[str]) -> None:
    marks = {}
    for name in ("digits", "paper_cifar10_vector_256"):
        print_run(describe_run(load_config(name)), everything=True)
        words = capsys.readouterr().out.split()
        marks[name] = {mark for mark in ("assumed", "paper") if words.count(mark) > 5}
    assert marks == {"digits": set(), "paper_cifar10_vector_256": {"assumed", "paper"}}


def test_time_is_estimated_for_every_stage_whose_work_is_known(capsys: pytest.CaptureFixture[str]) -> None:
    described = describe_run(load_config("digits", ["diffusion=null"]))
    costs = described["estimate"]
    assert set(costs["seconds"]) == {"meta_train", "encode", "train_classifier"}
    arithmetic = {name: work / costs["flops_per_s"] for name, work in costs["stage_flops"].items()}
    assert all(seconds > arithmetic[name] for name, seconds in costs["seconds"].items())
    assert costs["stage_flops"]["meta_train"] + costs["stage_flops"]["encode"] == pytest.approx(costs["flops"])
    print_run(described)
    assert "Time on this machine, roughly: meta-train " in capsys.readouterr().out


def test_start_up_and_a_time_for_every_step_are_added_to_the_arithmetic() -> None:
    """Nearly no arithmetic on a machine that is nearly infinitely fast: what remains is start-up and steps."""
    config = load_config("digits", ["inner.compile=off"])
    for stage, steps in (("meta_train", 700), ("train_classifier", 600), ("train_diffusion", 600)):
        assert stage_seconds(config, stage, 1.0, 1e15) == pytest.approx(START + steps * STEP[stage])
    assert stage_seconds(config, "encode", 1.0, 1e15) == pytest.approx(START_ENCODING)
    assert stage_seconds(config, "train_classifier", 1e12, 1e11) == pytest.approx(
        START + 600 * STEP["train_classifier"] + 10 / SHARE
    )


def test_an_average_of_the_weights_is_counted() -> None:
    estimated = [estimate(f"meta_train.ema={ema}")["memory_bytes"] for ema in (0, 0.9)]
    config = load_config("digits")
    memory = [outer_memory(config.field, config.inner, (8, 8), 1, 64, average=average) for average in (False, True)]
    assert estimated[1] - estimated[0] == memory[1] - memory[0] > 0


@pytest.mark.parametrize(
    ("overrides", "batch", "cores"),
    [
        (["inner.compile=off"], 64, 1),
        (["inner.compile=auto", "meta_train.steps=1", "meta_train.warmup=0"], 64, 1),  # not worth compiling
        (["inner.compile=on"], 64, 6),
        (["inner.compile=on", "dispatch.devices=2"], 32, 3),
        (["inner.compile=on", "inner.checkpoint=true"], 64, 1),
        (["inner.compile=on", "dispatch.device=cuda"], 64, 1),
        (["inner.compile=off", "dispatch.devices=3"], 22, 1),
        (["inner.compile=off", "dispatch.devices=4", "meta_train.micro_batch=32"], 16, 1),
        (["inner.compile=off", "dispatch.devices=4", "meta_train.micro_batch=5"], 5, 1),
    ],
)
def test_memory_is_of_the_chunks_and_images_that_a_process_has_at_once(
    overrides: list[str], batch: int, cores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if cores > 1 and (torch.cuda.is_available() or not has_compiler(torch.device("cpu"))):
        pytest.skip("nothing is compiled for a CPU here")
    monkeypatch.setenv("OMP_NUM_THREADS", "6")
    sets = ["meta_train.batch=64", "inner.chunk=256", *overrides]  # of 64 x 64 pixels
    config = load_config("digits", sets)
    kept = 1797 * 64  # the digits themselves
    expected = outer_memory(config.field, config.inner, (8, 8), 1, batch, cores) + kept
    assert estimate(*sets)["memory_bytes"] == expected


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="cores cannot be taken from a process here")
@pytest.mark.parametrize("wished", ["", "2", "2,1"])
def test_threads_are_counted_as_torch_counts_them(wished: str) -> None:
    code = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "from functa.tasks.dispatch.child import threads_of_a_run\n"
        "counted = threads_of_a_run(); import torch; print([counted, torch.get_num_threads()])"
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    child = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PROJECT,
        env=environment | ({"OMP_NUM_THREADS": wished} if wished else {}),
    )  # fmt: skip
    assert json.loads(child.stdout) == [int(wished[:1] or 1)] * 2


def test_augmented_training_images_are_counted_and_test_images_once() -> None:
    alone, augmented = estimate(), estimate("encode.augmentation.count=3")
    assert alone["store_bytes"] == (1497 + 300) * 32
    assert augmented["store_bytes"] == (4 * 1497 + 300) * 32
    one, two = (estimate("meta_train.warmup=0", f"meta_train.steps={steps}")["flops"] for steps in (1, 2))
    encoding = one - (two - one)  # without a step of meta-training
    assert augmented["flops"] - alone["flops"] == pytest.approx(encoding * 3 * 1497 / 1797, rel=1e-3)


def test_learning_on_latents_is_three_forward_passes_of_every_example() -> None:
    """An MLP takes two FLOPs a weight; for a Transformer torch counts them."""
    mlp = ["classifier.model.kind=mlp", "classifier.model.width=32", "classifier.model.depth=2"]
    found = estimate(*mlp, "classifier.steps=70", "classifier.batch=10", "diffusion=null")["training_flops"]
    assert found == {"classifier": 3 * 2 * (32 * 32 + 32 * 32 + 32 * 10) * 10 * 70}
