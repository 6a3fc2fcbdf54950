"""A Prefect home of the test's own."""

import os
from pathlib import Path

import pytest

from functa.flows.server import api


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Prefect home without profiles, and no setting in the environment."""
    for name in [name for name in os.environ if name.startswith("PREFECT_") or name == "DO_NOT_TRACK"]:
        monkeypatch.delenv(name)
    for name in (*api.MANNERS, "PREFECT_SERVER_EPHEMERAL_ENABLED", api.PASSWORD):
        # prepare_environment sets these; having been here, monkeypatch takes them away afterwards
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "home"))
    return tmp_path / "home"
