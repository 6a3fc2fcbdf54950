"""Small trainings take one thread: beside other work two would wait for each other."""

import subprocess
import sys

import pytest

from functa.flows.config.load import load_config
from functa.models.field.cost import outer_flops


def threads_after(flops: float) -> int:
    """Return how many of two threads a process keeps for steps of so many FLOPs."""
    code = (
        "import torch; from functa.models.compute.parallel import fit_threads; torch.set_num_threads(2); "
        f"fit_threads({flops}, torch.device('cpu')); print(torch.get_num_threads())"
    )
    return int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


@pytest.mark.parametrize(("flops", "threads"), [(1e9, 1), (1e10, 2)])
def test_a_small_step_takes_one_thread(flops: float, threads: int) -> None:
    assert threads_after(flops) == threads


def test_the_outer_step_of_the_demo_takes_one_thread() -> None:
    config = load_config("digits", [])
    assert threads_after(outer_flops(config.field, config.inner, (8, 8), 1) * config.meta_train.batch) == 1
