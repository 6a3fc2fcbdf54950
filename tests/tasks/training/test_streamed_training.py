"""Trainings on a functaset of three times the memory that their process is given, killed and continued."""

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from functa.flows.config.load import load_config
from functa.storage.config import QuantizationConfig
from functa.storage.functaset.commit import commit
from functa.storage.functaset.plan import RowTable
from functa.storage.functaset.planning import plan_fragment
from functa.storage.functaset.quantizer import Quantizer, calibrate
from functa.storage.functaset.receipts.moments import moments_of
from functa.storage.functaset.shards import writing
from functa.storage.functaset.shards.writing import write_shard
from functa.storage.places.address import open_location
from functa.storage.places.location import Location
from functa.storage.runs.checkpoints import load_checkpoint
from functa.tasks.dispatch.child import PROJECT
from functa.tasks.training_jobs import ClassifierJob, DiffusionJob, TrainingJob
from tests.helpers.storage.functasets import new_store, shard_of

LIMIT = 1500 << 20  # of a training process's data, of which torch takes about half

SHAPE, SHARD_ROWS = (16, 16, 256), 256  # 64 KiB of codes a row, 16 MiB a shard

LARGE, SMALL = 3 * LIMIT // (16 << 20), 3 * LIMIT // (160 << 20)  # shards

TINY = {
    "classifier": ["model.width=8", "model.depth=1", "model.heads=1", "model.dropout=0", "noise=0", "ema=0"],
    "diffusion": [
        "model.channels=8",
        "model.blocks=1",
        "model.groups=4",
        "model.head_channels=8",
        "micro_batch=8",
        "ema=0",
        "compile=off",
    ],
}


def codes_of_rows(count: int) -> np.ndarray:
    """Return latents float32 [n, *SHAPE] that differ from row to row and compress well: few bytes lie on disk."""
    return np.broadcast_to(np.linspace(-1, 1, count, dtype=np.float32)[:, None, None, None], (count, *SHAPE))


def fill_split(place: Location, split: str, shards: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> str:
    """Write a split whose shards have the same latents; the labels are those of the row's number."""
    keys = [f"{split}/{number:07d}" for number in range(shards * rows)]
    labels = (np.random.default_rng(0).permutation(len(keys)) % 10).astype(np.int32)
    latents = codes_of_rows(rows)
    quantizer = calibrate(QuantizationConfig(bits=8), np.array(latents[:: max(1, rows - 1)]))
    plan = plan_fragment(
        place, RowTable.of(keys, labels, keys), split=split, latent_shape=SHAPE, shard_rows=rows, chunk_rows=rows,
        codec="zstd", quantizer=quantizer,
    ).plan  # fmt: skip
    coded, moments = quantizer.encode(latents), moments_of(np.array(latents))
    monkeypatch.setattr(Quantizer, "encode", lambda *_: coded)  # the same of every shard: computed once
    monkeypatch.setattr(writing, "moments_of", lambda _: moments)
    for shard in range(shards):
        digests = np.full((rows, 32), shard % 256, np.uint8)
        write_shard(shard_of(place, plan, shard), latents=latents, psnr=np.full(rows, 30.0), sha256=digests)
    monkeypatch.undo()
    return plan.id


@pytest.fixture(scope="module")
def functasets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder, found = tmp_path_factory.mktemp("z"), {}
    for name, shards in (("large", LARGE), ("small", SMALL)):
        with pytest.MonkeyPatch.context() as patched:
            place = new_store(folder / name)
            commit(place, [fill_split(place, "train", shards, SHARD_ROWS, patched)])
            commit(place, [fill_split(place, "test", 1, 32, patched)])
        found[name] = str(folder / name)
    return found


def job_of(kind: str, functaset: str, output: Path) -> TrainingJob:
    sets = ["steps=40", "batch=32", "warmup=0", "log_every=5", "checkpoint_seconds=0.01", "normalization.kind=scalar"]
    config = load_config("digits", [f"{kind}.{each}" for each in (*sets, *TINY[kind])])
    given: dict[str, Any] = {"seed": 0, "device": "cpu", "digest": "d", "functaset": functaset, "classes": 10}
    if kind == "classifier":
        return ClassifierJob(classifier=config.classifier, output=str(output), **given)
    return DiffusionJob(diffusion=config.diffusion, output=str(output), **given)


def run(job: TrainingJob, limit: int | None, kill_at: int | None = None) -> tuple[int, list[dict[str, Any]]]:
    """Run a training process; return its peak of resident bytes, and its rows."""

    def limited() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "functa.tasks.training"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}, text=True, preexec_fn=limited,
    )  # fmt: skip
    assert process.stdin
    assert process.stdout
    process.stdin.write(job.model_dump_json() + "\n")
    process.stdin.flush()
    rows = []
    for line in process.stdout:
        rows.append(json.loads(line))
        if kill_at is not None and rows[-1].get("step", 0) >= kill_at:
            process.send_signal(signal.SIGKILL)
            break
    _, _, used = os.wait4(process.pid, 0)
    process.returncode = 0
    return used.ru_maxrss << 10, rows


def tensors(output: Path) -> dict[str, np.ndarray]:
    checkpoint = load_checkpoint(open_location(str(output)))
    assert checkpoint is not None
    return checkpoint.tensors


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.timeout(1800)
@pytest.mark.skipif(sys.platform != "linux", reason="limits the data of a process")
@pytest.mark.parametrize("kind", ["classifier", "diffusion"])
def test_a_functaset_of_three_times_the_memory_trains_in_as_much_as_a_tenth_of_it_and_continues_bit_for_bit(
    kind: str, functasets: dict[str, str], tmp_path: Path
) -> None:
    peaks = {}
    for name in ("small", "large"):
        peaks[name], rows = run(job_of(kind, functasets[name], tmp_path / name), LIMIT)
        assert "done" in rows[-1], rows[-1]
        assert any("is streamed: it does not fit into memory" in row.get("note", "") for row in rows)
    print(json.dumps({"kind": kind, "peak_mib": {name: peak >> 20 for name, peak in peaks.items()}}))
    assert peaks["large"] <= 1.2 * peaks["small"]
    run(job_of(kind, functasets["large"], tmp_path / "killed"), LIMIT, kill_at=10)
    # With memory for the whole set now, it is streamed as before.
    _, rows = run(job_of(kind, functasets["large"], tmp_path / "killed"), None)
    assert any("resumed at step" in row.get("note", "") for row in rows)
    whole, killed = tensors(tmp_path / "large"), tensors(tmp_path / "killed")
    assert all(np.array_equal(whole[name], killed[name]) for name in whole)
