"""A disk that fills up during an evaluation: one line that names the path, and the rerun ends as if undisturbed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.server, pytest.mark.slow, pytest.mark.faults, pytest.mark.timeout(1200)]


def test_an_evaluation_on_a_full_disk_ends_with_one_line_and_goes_on_where_there_is_space(tmp_path: Path) -> None:
    namespace = ["unshare", "--map-root-user", "--mount"]
    probe = subprocess.run([*namespace, "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True, text=True)
    if probe.returncode != 0:
        pytest.skip(f"no mount namespace here: {probe.stderr.strip()}")
    done = subprocess.run(
        [*namespace, sys.executable, "-m", "tests.helpers.flows.full_root", str(tmp_path)],
        capture_output=True, text=True, timeout=1100,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    ended = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(ended) == 2
    for status, printed in ended:
        assert status == 1, printed
        assert "Traceback" not in printed
        (line,) = [each for each in printed.splitlines() if each.startswith("functa: ")]
        assert "No space left on device; free some space" in line
        assert str(tmp_path / "disk" / "root") in line
