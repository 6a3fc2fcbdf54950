"""Whole runs with kills at random instants: every byte as if undisturbed.

tests/helpers/flows/comparable.py names the values that no two runs have in common, and which are not compared.
"""

import random
from pathlib import Path

import pytest
from prefect.settings import PREFECT_API_URL

from tests.helpers.flows.comparable import comparable
from tests.helpers.flows.whole_run import WholeRun, kills_of_this_run

pytestmark = [pytest.mark.server, pytest.mark.slow, pytest.mark.faults, pytest.mark.timeout(3600)]

ROUNDS = 5  # each with seeds and roots of its own


@pytest.fixture(scope="module")
def undisturbed(prefect_server: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], float]:
    """Return the bytes of an undisturbed run, and the seconds that it took."""
    run = WholeRun(tmp_path_factory.mktemp("undisturbed"), PREFECT_API_URL.value())
    seconds = run.undisturbed()
    return comparable(run.root), seconds


def different(one: dict[str, str], other: dict[str, str]) -> list[str]:
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


@pytest.mark.parametrize("seed", range(ROUNDS))
def test_a_run_that_is_killed_at_random_instants_ends_with_the_bytes_of_an_undisturbed_one(
    seed: int, undisturbed: tuple[dict[str, str], float], tmp_path: Path
) -> None:
    """SIGKILL of the main process, a training, or all, or Ctrl-C; the same command is given until it has finished.

    Every other seed has a server that outlives the kills, the others one of each command's own.
    """
    expected, seconds = undisturbed
    api = PREFECT_API_URL.value() if seed % 2 else ""
    dice, kills, number = random.Random(seed), -(-kills_of_this_run() // ROUNDS), 0
    while kills > 0:
        run = WholeRun(tmp_path / str(number), api)
        run.until_finished(dice, kills, 0.6 * seconds)
        assert different(comparable(run.root), expected) == [], f"seed {seed}, after {run.kills}"
        assert "Traceback" not in run.log
        assert run.left_behind(60) == []
        print(f"seed {seed}, run {number}: {run.kills}: {len(expected)} files equal")
        kills, number = kills - len(run.kills), number + 1
