"""The page on Slurm: its first job script, under a substitute for `sbatch`, is interrupted and continues."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from functa.flows.config.load import load_config
from tests.helpers.docs.pages import DOCS, PROJECT, blocks
from tests.helpers.docs.reader import PRELUDE, furnish
from tests.helpers.flows.prefect_server import eventually
from tests.helpers.flows.tiny_config import TINY

PAGE = DOCS / "how-to/slurm.md"
SHORT = ["classifier=null", "diffusion=null", "evaluation.quick=true", "inner.compile=off", "meta_train.steps=150",
         "meta_train.log_every=1", "meta_train.checkpoint_seconds=0.2", "dispatch.device=cpu"]  # fmt: skip


def job(script: Path, folder: Path, **variables: str) -> "subprocess.Popen[bytes]":
    """Run a job script as Slurm does: by its shell, in the folder of its submission, with Slurm's variables."""
    slurm = {"SLURM_JOB_ID": "4711", "SLURM_GPUS": "1", "SLURM_SUBMIT_HOST": "localhost"}
    own = {"HOME": str(folder / "home"), "PYTHONPATH": str(PROJECT)}
    environment = os.environ | slurm | own | variables
    return subprocess.Popen(["bash", script], cwd=folder, env=environment, start_new_session=True)


def test_the_scripts_are_shell_and_ask_for_a_signal_before_the_end(tmp_path: Path) -> None:
    scripts = blocks(PAGE, "bash")
    assert len(scripts) == 2
    for block in scripts:
        subprocess.run(["bash", "-n", "-c", PRELUDE + block.text], check=True)
        assert "#SBATCH --signal=B:TERM@" in block.text, "the signal must reach the shell, which `exec` has replaced"
        assert block.text.splitlines()[-2].startswith("exec ") or "\nexec " in block.text


@pytest.mark.slow
@pytest.mark.server
@pytest.mark.faults
@pytest.mark.timeout(900)
def test_a_job_that_gets_slurms_signal_continues_when_it_is_submitted_again(tmp_path: Path) -> None:
    furnish(tmp_path)
    script, config, root = tmp_path / "functa.sbatch", tmp_path / "tiny.yaml", tmp_path / "root"
    script.write_text(blocks(PAGE, "bash")[0].text)
    settings = load_config("digits", [*TINY, "meta_train.warmup=0", *SHORT[:-1]]).model_dump(mode="json")
    config.write_text(yaml.safe_dump(settings | {"dispatch": settings["dispatch"] | {"device": "cpu"}}))
    first = job(script, tmp_path, PRESET=str(config), ROOT=str(root), IMAGES="")
    try:
        eventually(lambda: any(root.glob("checkpoints/*/*")), 300, "a checkpoint is there")
        time.sleep(0.5)
        first.send_signal(signal.SIGTERM)
        assert first.wait(120) in (143, -signal.SIGTERM)
    finally:
        if first.poll() is None:
            os.killpg(first.pid, signal.SIGKILL)
    assert not (root / "metrics.json").exists()
    again = job(script, tmp_path, PRESET=str(config), ROOT=str(root), IMAGES="")
    assert again.wait(600) == 0
    assert json.loads((root / "metrics.json").read_text())["rows"] == 400
