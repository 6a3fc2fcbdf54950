"""Programs that a test needs from Debian's packages, installed where that is allowed."""

import os
import subprocess

import pytest


def install(*packages: str) -> None:
    """Install packages; skip the test, naming them, where this user may not or where it fails."""
    wanted = f"apt-get install -y --no-install-recommends {' '.join(packages)}"
    if os.geteuid() != 0 or not os.path.exists("/usr/bin/apt-get"):
        pytest.skip(f"no {' and '.join(packages)}, and this user may not install it: {wanted}")
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    for command in ("apt-get update", wanted):
        done = subprocess.run(command.split(), env=environment, capture_output=True, text=True, timeout=600)
        if done.returncode:
            pytest.skip(f"{command} failed: {done.stderr.strip().splitlines()[-1:] or done.returncode}")
