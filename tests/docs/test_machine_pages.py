"""The pages on clusters, as far as one machine can follow them: the bucket is moto's, nodes are processes with gloo."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.helpers.docs.pages import DOCS, Block, blocks
from tests.helpers.docs.reader import environment_of, furnish, run_block, script
from tests.helpers.flows.prefect_server import free_port

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

SRUN = """
shift
for node in $(seq 0 $((SLURM_NNODES - 1))); do SLURM_NODEID=$node "$@" & pids+=($!); done
for pid in "${pids[@]}"; do wait "$pid" || status=$?; done
exit ${status:-0}
"""


def clean_environment(folder: Path) -> dict[str, str]:
    """Return the reader's environment without the Prefect of other tests: its folder is where the page names it."""
    kept = {name: value for name, value in environment_of(folder).items() if not name.startswith("PREFECT_")}
    kept.pop("XDG_DATA_HOME", None)
    return kept | {"OMP_NUM_THREADS": "1", "TMPDIR": str(folder)}


def stages(root: Path) -> set[str]:
    """Return the stages that a root has finished."""
    records = [json.loads(file.read_text()) for file in (root / "stages").glob("*.json")]
    return {record["stage"] for record in records if record["state"] == "finished"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    furnish(tmp_path)
    script(tmp_path / ".venv/bin/srun", SRUN, shell="bash")
    script(tmp_path / ".venv/bin/hostname", "echo 127.0.0.1")
    return tmp_path


def test_one_training_on_several_nodes(folder: Path) -> None:
    (page,) = blocks(DOCS / "how-to/slurm.md", "sh")[3:]
    training = Block(page.page, page.line, "sh", page.text.replace("29500", str(free_port())))
    root = folder / "functa-runs/nodes"
    shutil.copytree(folder / "functa-runs/digits", root)
    (root / "stages/train_diffusion.json").unlink()
    shutil.rmtree(root / "checkpoints/diffusion")
    chosen = {"PRESET": "digits", "ROOT": str(root), "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "1"}
    chosen |= {"SLURM_JOB_ID": "7"}
    run_block(training, folder, environment=clean_environment(folder) | chosen)
    assert "train_diffusion" in stages(root)


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


def test_imagenet_is_packed_into_tars_and_found_in_a_bucket(folder: Path, moto: dict[str, str]) -> None:
    pack, fill = blocks(DOCS / "how-to/imagenet.md", "python", "sh")[:2]
    photographs(folder / "imagenet")
    environment = clean_environment(folder) | moto
    run_block(pack, folder, environment=environment)
    made = Block(fill.page, fill.line, "python", "import s3fs; s3fs.S3FileSystem().mkdir('functa-imagenet')")
    run_block(made, folder, environment=environment)
    assert "s3://functa-imagenet/tars" in run_block(fill, folder, environment=environment)
