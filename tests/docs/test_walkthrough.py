"""The README and the tutorials, followed from top to bottom: every command and block, in order, in one folder.

Installing, and starting a server until Ctrl-C, have tests of their own.
"""

import re
from pathlib import Path

import pytest

from tests.helpers.docs.pages import DOCS, PROJECT, Block, blocks
from tests.helpers.docs.reader import furnish, run_block

ELSEWHERE = re.compile(r"^(make |source |.*functa (up|doctor)\b)")  # tests/flows/server, tests/docs/test_commands.py


def follow(page: Path, folder: Path) -> list[str]:
    """Run the page's blocks in order; return what each printed."""
    outputs = []
    for block in blocks(page, "sh", "python"):
        if block.language == "sh":
            lines = [line for line in block.text.splitlines() if not ELSEWHERE.match(line)]
            block = Block(block.page, block.line, "sh", "\n".join(lines))
        outputs.append(run_block(block, folder))
    return outputs


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    "page",
    [
        PROJECT / "README.md",
        DOCS / "tutorial/first-run.md",
        DOCS / "tutorial/photographs.md",
        DOCS / "how-to/python.md",
    ],
    ids=lambda page: page.stem,
)
def test_a_page_can_be_followed_from_top_to_bottom(page: Path, tmp_path: Path) -> None:
    furnish(tmp_path)
    assert any(follow(page, tmp_path))
