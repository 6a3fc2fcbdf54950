"""Fixtures that several task tests share."""

from pathlib import Path

import pytest

from tests.helpers.tasks.encoding import trained_field


@pytest.fixture(scope="session")
def field(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a field that was trained on digits for a few steps."""
    return trained_field(tmp_path_factory.mktemp("field"))
