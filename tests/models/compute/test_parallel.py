"""Small trainings take one thread: beside other work two would wait for each other."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize(("flops", "threads"), [(1e9, 1), (1e10, 2)])
def test_a_small_step_takes_one_thread(flops: float, threads: int) -> None:
    code = (
        "import torch; from functa.models.compute.parallel import fit_threads; torch.set_num_threads(2); "
        f"fit_threads({flops}, torch.device('cpu')); print(torch.get_num_threads())"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        == f"{threads}\n"
    )


def test_the_demos_outer_step_is_small() -> None:
    from functa.flows.config.load import load_config
    from functa.models.compute.parallel import SMALL_STEP
    from functa.models.field.cost import outer_flops

    config = load_config("digits", [])
    assert outer_flops(config.field, config.inner, (8, 8), 1) * config.meta_train.batch < SMALL_STEP
