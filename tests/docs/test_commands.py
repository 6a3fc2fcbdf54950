"""Commands on the pages are ones that the command and the Makefile accept."""

import re
import shlex

import pytest

from functa.flows.cli.main import app
from tests.helpers.docs.pages import PROJECT, Block, blocks, commands, pages

SHELL = [block for page in pages() for block in blocks(page, "sh")]
CALL = re.compile(r"^(\S+/)?functa ")
FUNCTA = [(block, line) for block in SHELL for line in commands(block) if CALL.match(line)]


@pytest.mark.parametrize(("block", "line"), FUNCTA, ids=lambda value: str(value) if isinstance(value, Block) else "")
def test_a_functa_command_is_accepted(block: Block, line: str) -> None:
    arguments = CALL.sub("", line).removesuffix(" &")
    app.parse_args(shlex.split(arguments), exit_on_error=False, print_error=False)


def test_every_make_target_exists() -> None:
    targets = set(re.findall(r"^([a-z0-9-]+):", (PROJECT / "Makefile").read_text(), re.MULTILINE))
    named = {
        target for block in SHELL for line in commands(block) for target in re.findall(r"^make ([a-z0-9-]+)", line)
    }
    assert named and named <= targets
