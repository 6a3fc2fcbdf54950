"""The documentation site builds strictly, and its pages ask no other machine for anything."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.docs.pages import PROJECT

REMOTE = re.compile(
    r"""(?:src|srcset)=["'](?:https?:)?//|<link[^>]+href=["'](?:https?:)?//(?![^"']*canonical)|url\((?:https?:)?//"""
)


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_without_remote_assets(tmp_path: Path) -> None:
    site = tmp_path / "site"
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)],
        cwd=PROJECT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    pages = list(site.rglob("*.html"))
    assert {"reference/settings.html", "reference/command.html", "tutorial/photographs.html"} <= {
        page.relative_to(site).as_posix() for page in pages
    }
    assert [page.name for page in pages if REMOTE.search(page.read_text())] == []
