"""CONTRIBUTING fits the code: files that it names exist, and its examples import names that there are."""

import ast
import re
import textwrap
from importlib import import_module

import pytest

from tests.helpers.docs.pages import PROJECT, Block, blocks, pages, prose

PAGE = PROJECT / "CONTRIBUTING.md"
EXAMPLES = {"deploy/gpus.yaml", "tasks/evaluation/sharpness.py", "storage/images/stripes.py", "flows/counting.py"}


def test_files_that_pages_name_exist() -> None:
    named = {path for page in pages() for path in re.findall(r"`([a-z_]+/[\w/.-]+\.(?:py|yaml|xz))`", prose(page))}
    assert named
    assert [path for path in sorted(named - EXAMPLES) if not (PROJECT / path).exists()] == []


@pytest.mark.parametrize("block", blocks(PAGE, "python"), ids=str)
def test_an_example_imports_names_that_exist(block: Block) -> None:
    tree = ast.parse(textwrap.dedent(block.text).rstrip().removesuffix(","))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("functa."):
            module = import_module(node.module)
            assert [name.name for name in node.names if not hasattr(module, name.name)] == []
