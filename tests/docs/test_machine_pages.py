"""The pages on clusters and several GPUs, followed on this machine: jobs, pool, bucket and GPUs have substitutes.

tests/helpers/docs/machines.py has them; presets become small, and ports become free ones. Trainings of several
processes use gloo on CPUs, the bucket is moto's, the workers of the pool are processes.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.helpers.docs.machines import (
    end_jobs,
    finish_jobs,
    furnish_machines,
    machine_environment,
    on_free_ports,
    serving_block,
)
from tests.helpers.docs.pages import DOCS, Block, blocks
from tests.helpers.docs.reader import run_block
from tests.helpers.flows.worker_cluster import Cluster

pytestmark = [pytest.mark.slow, pytest.mark.server, pytest.mark.timeout(3600)]

JOB_SECONDS = 1800


def stages(root: Path) -> set[str]:
    """Return the stages that a root has finished."""
    records = [json.loads(file.read_text()) for file in (root / "stages").glob("*.json")]
    return {record["stage"] for record in records if record["state"] == "finished"}


EVERYTHING = {"meta_train", "encode", "train_classifier", "train_diffusion", "evaluate"}


def split_off(block: Block, beginning: str) -> tuple[Block, Block]:
    """Return the lines before the first one that begins so, and from there on."""
    lines = block.text.splitlines()
    at = next(number for number, line in enumerate(lines) if line.startswith(beginning))
    first, rest = ("\n".join(part) for part in (lines[:at], lines[at:]))
    return Block(block.page, block.line, block.language, first), Block(block.page, block.line, block.language, rest)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    furnish_machines(tmp_path)
    return tmp_path


def test_the_jobs_of_slurm(folder: Path) -> None:
    page = on_free_ports(*blocks(DOCS / "how-to/slurm.md", "bash", "sh"))
    scripts, shell = ([block for block in page if block.language == kind] for kind in ("bash", "sh"))
    for block in scripts:
        name = block.text.splitlines()[1].removeprefix("# ").partition(":")[0]
        (folder / name).write_text(block.text)
    environment = machine_environment(folder)
    job, status = split_off(shell[0], ".venv/bin/functa status")
    try:
        run_block(job, folder, environment=environment)
        assert finish_jobs(folder, JOB_SECONDS) == ["0"]
        root = folder / "functa-runs/slurm"
        run_block(status, folder, environment=environment | {"ROOT": str(root)})
        assert stages(root) >= EVERYTHING
        with serving_block(shell[1], folder, environment):
            run_block(shell[2], folder, environment=environment | {"HOSTNAME": "localhost"})
            logs = [file.read_text() for file in folder.glob("slurm-workers.sbatch-*.out")]
            assert len(logs) == 2
            assert all("started!" in log for log in logs)
            assert sum(log.count("Completed submission of flow run") for log in logs)
            end_jobs(folder)
        assert stages(folder / "functa-runs/pool") >= EVERYTHING
    finally:
        end_jobs(folder)


def test_one_training_on_several_nodes(folder: Path) -> None:
    (training,) = on_free_ports(*blocks(DOCS / "how-to/slurm.md", "sh")[3:])
    root = folder / "functa-runs/nodes"
    shutil.copytree(folder / "functa-runs/digits", root)
    (root / "stages/train_diffusion.json").unlink()
    shutil.rmtree(root / "checkpoints/diffusion")
    chosen = {"PRESET": "digits", "ROOT": str(root), "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "1"}
    run_block(training, folder, environment=machine_environment(folder) | chosen)
    assert "train_diffusion" in stages(root)


def test_one_machine_with_four_gpus(folder: Path) -> None:
    alone, served, deployed = on_free_ports(*blocks(DOCS / "how-to/four-gpus.md", "sh"))
    environment = machine_environment(folder)
    run_block(alone, folder, environment=environment)
    assert stages(folder / "functa-runs/four") >= EVERYTHING
    with serving_block(served, folder, environment | {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}):
        run_block(deployed, folder, environment=environment)
    assert stages(folder / "home/runs/digits") >= EVERYTHING


def photographs(folder: Path) -> None:
    """Write class folders as ImageNet has them, of images of several sizes."""
    random = np.random.default_rng(0)
    for split, count in (("train", 20), ("val", 4)):
        for name in ("n01440764", "n01443537", "n01484850"):
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                size = tuple(int(side) for side in random.integers(200, 400, 2))
                coarse = Image.fromarray(random.integers(0, 256, (6, 8, 3), np.uint8))
                image = coarse.resize(size, Image.Resampling.BICUBIC)
                image.save(folder / split / name / f"{split}_{name}_{number:08d}.JPEG")


def test_imagenet_in_a_bucket(folder: Path, moto: dict[str, str]) -> None:
    pack, fill, pool, encode = on_free_ports(*blocks(DOCS / "how-to/imagenet.md", "python", "sh"))
    photographs(folder / "imagenet")
    environment = machine_environment(folder) | moto
    run_block(pack, folder, environment=environment)
    made = Block(fill.page, fill.line, "python", "import s3fs; s3fs.S3FileSystem().mkdir('functa-imagenet')")
    run_block(made, folder, environment=environment)
    run_block(fill, folder, environment=environment)
    (folder / "cluster").mkdir()
    workplace = Cluster(folder / "cluster", moto | {"FUNCTA_ALLOWED_ROOTS": "s3://functa-imagenet"})
    try:
        workplace.start_server()
        environment["PREFECT_API_URL"] = workplace.api
        run_block(pool, folder, environment=environment)
        assert workplace.ask("work_pools/functa")["type"] == "kubernetes"
        assert "FUNCTA_ALLOWED_ROOTS=s3://functa-imagenet" in (folder / "kubectl.log").read_text()
        # No cluster is here: a pool of processes takes the place of the one whose pods nobody starts.
        workplace.served().ask("work_pools/functa", method="DELETE")
        workplace.bootstrap("--gpus", "1")
        for queue, device in (("cpu", None), ("gpu", "0")):
            workplace.start_worker(queue, device)
        printed = run_block(encode, folder, environment=environment)
        assert "s3://functa-imagenet/root" in printed
    finally:
        workplace.stop()
