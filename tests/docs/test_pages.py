"""Pages link to what exists, and the README is short."""

import re
from pathlib import Path

import pytest

from tests.helpers.docs.pages import PROJECT, anchors, blocks, links, pages, prose

WORDS = 90  # about 70 of prose, and a line of links
FOLDERS = ("flows", "tasks", "models", "storage", "deploy", "tests", "benchmarks", "docs")
EXAMPLES = {  # files that a reader adds
    "benchmarks/NAME.py", "deploy/gpus.yaml", "flows/counting.py", "storage/images/stripes.py",
    "tasks/evaluation/sharpness.py",
}  # fmt: skip


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(PROJECT)))
def test_links_lead_to_files_and_headings_that_exist(page: Path) -> None:
    for target in links(page):
        if re.match(r"https?:", target):
            continue
        name, _, anchor = target.partition("#")
        linked = (page.parent / name).resolve() if name else page
        assert linked.is_file(), f"{page}: {target}"
        assert not anchor or anchor in anchors(linked), f"{page}: {target}"


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(PROJECT)))
def test_code_blocks_name_their_language(page: Path) -> None:
    assert [str(block) for block in blocks(page) if not block.language] == []


def test_the_readme_has_at_most_70_words_of_prose_per_heading_and_no_long_line() -> None:
    readme = PROJECT / "README.md"
    assert [line for line in readme.read_text().splitlines() if len(line) > 120] == []
    for section in re.split(r"^#+ ", prose(readme), flags=re.MULTILINE)[1:]:
        text = re.sub(
            r"\]\([^)]*\)|^[|!].*$", "", section.partition("\n")[2], flags=re.MULTILINE
        )  # addresses, tables, pictures
        assert len(re.findall(r"[\w'-]+", text)) <= WORDS, section


def test_files_that_code_and_pages_name_exist() -> None:
    path = re.compile(r"\b(?:flows|tasks|models|storage|deploy|tests|docs|benchmarks)/[\w/.-]+\.(?:py|md|yaml|json)\b")
    current = [page for page in pages() if page.name != "CHANGELOG.md"]
    files = [*current, *(file for folder in FOLDERS for file in (PROJECT / folder).rglob("*.py"))]
    named = {name: file for file in files for name in path.findall(file.read_text())}
    missing = {name: file for name, file in named.items() if not (PROJECT / name).exists()}
    assert not missing.keys() - EXAMPLES, missing
