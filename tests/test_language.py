"""Source, tests and documents are written in plain technical English: the project's old dialect does not return."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[1]
FOLDERS = ("flows", "tasks", "models", "storage", "deploy", "functa", "benchmarks", "tests", "docs")
KINDS = {".py", ".md", ".yaml", ".yml", ".toml", ".j2", ".sh", ".cfg", ".css", ".js"}
TOP = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "pyproject.toml", "Makefile", "mkdocs.yml")
THIS = "tests/test_language.py"
PEER = "jax_functa.py"  # kept as it came

# An underscore separates words here, and a capital letter begins one: names of functions and classes count too.
BANNED = {
    r"stands?|stood": "is up to date, exists, finished, or what the sentence means",
    r"told|tells?|TOLD": "reported, message, log, shows",
    r"says?|said|saying": "shows, prints, describes, means",
    r"speaks?|spoken|speaking": "prints, calls, uses",
    r"mend(?:s|ed|ing)?": "fix, repair",
    r"lent|lend(?:s|er|ing)?|borrow(?:s|ed|er|ers|ing)?": "reused from another root",
    r"barred|withdrawn|given[ _]?up|gone": "retired, expired, collected, erased; missing",
    r"outrun": "newer commit available",
    r"rooms?|houses?|walls?": "package, layout, import rule",
}
WORDS = re.compile(
    rf"(?<![A-Za-z])(?i:{'|'.join(BANNED)})(?![a-z])|(?<=[a-z])(?:GivenUp|Stands|Told|Gone|Lent|Withdrawn)(?![a-z])"
)
BEGINNINGS = re.compile(r"(?:Of|By|What|Where|As|Which|Who|How)\b")

# Proper uses: keys of stored JSON and of the configuration, methods of Python, terms of their fields.
PROPER = re.compile(
    r"""["']?withdrawn["']?\s*[:=\])]|["']withdrawn["']|["']barred["']|alias="\w+" |\bbarred:
    | max_gone_fraction | b"given[ ]up\\n" | (?:\.|def[ ])tell\( |
    https?://\S+ | [Ww]all[-_ ](?:clock|time)s? | --wall\S*""",
    re.VERBOSE,
)


def files() -> list[Path]:
    """Return every file of source, tests and documents, each once."""
    found = [path for folder in FOLDERS for path in sorted((PROJECT / folder).rglob("*")) if path.suffix in KINDS]
    found += [PROJECT / name for name in TOP if (PROJECT / name).exists()]
    ours = [path for path in found if not {"__pycache__", "site", PEER} & set(path.parts)]
    return [path for path in ours if path == path.resolve()]  # functa/ links to the packages


def faults(path: Path) -> Iterator[str]:
    """Yield FILE:LINE and the word for each word or docstring that another one has to replace."""
    name, text = path.relative_to(PROJECT), path.read_text()
    for number, line in enumerate(text.splitlines(), 1):
        for found in WORDS.finditer(PROPER.sub(" ", line)):
            yield f"{name}:{number}: '{found.group()}'"
    if path.suffix == ".py":
        for number, begins in docstrings(text):
            yield f"{name}:{number}: a docstring begins with '{begins}'"


def docstrings(text: str) -> Iterator[tuple[int, str]]:
    """Yield the line of each docstring that begins with a banned word, and that word."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            found = BEGINNINGS.match(ast.get_docstring(node) or "")
            if found:
                yield node.body[0].lineno, found.group()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("what stands already is kept", ["stands"]),
        ("the models it lent; GivenUp(), given_up() or all_told", ["lent", "GivenUp", "given_up", "told"]),
        ("class RunGivenUp:", ["GivenUp"]),
        ("understand, standard, bygone, forsaid, talent, window", []),
        ("position = file.tell()  # max_gone_fraction, wall clock", []),
        ('record["withdrawn"] = rows', []),
    ],
)
def test_the_words_are_found_where_they_are_meant(text: str, words: list[str]) -> None:
    assert [found.group() for found in WORDS.finditer(PROPER.sub(" ", text))] == words


def test_docstrings_are_found_by_their_first_word() -> None:
    source = 'def size(): \n    """Of the image."""\ndef rows():\n    """Offer rows. By name."""\n'
    assert list(docstrings(source)) == [(2, "Of")]


def test_source_tests_and_documents_use_plain_words() -> None:
    found = [
        fault for path in files() if str(path.relative_to(PROJECT)) != THIS
        for fault in faults(path)
    ]  # fmt: skip
    assert not found, f"{len(found)} words to replace, such as:\n" + "\n".join(found[:50])
