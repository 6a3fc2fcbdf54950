"""The Markdown pages of the repository: their code blocks, headings and links."""

import re
from dataclasses import dataclass
from pathlib import Path

PROJECT = Path(__file__).parents[3]
DOCS = PROJECT / "docs"

FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, and where it begins."""

    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(PROJECT)}:{self.line}"


def pages() -> list[Path]:
    """Return every page for readers: those at the top of the repository and those of the site."""
    return sorted([*PROJECT.glob("*.md"), *DOCS.rglob("*.md")])


def blocks(page: Path, *languages: str) -> list[Block]:
    """Return the page's fenced blocks in order, of these languages or of all."""
    text = page.read_text()
    found = [Block(page, text.count("\n", 0, match.start()) + 1, match[2], match[3]) for match in FENCE.finditer(text)]
    return [block for block in found if not languages or block.language in languages]


def prose(page: Path) -> str:
    """Return the page without its fenced blocks."""
    return FENCE.sub("", page.read_text())


def links(page: Path) -> list[str]:
    """Return the targets of the page's links and images."""
    return re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]*`", "", prose(page)))


def anchors(page: Path) -> set[str]:
    """Return the anchors of the page's headings, as the site and common hosts of repositories make them."""
    return {_slug(title) for title in re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)}


def _slug(title: str) -> str:
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower())


def commands(block: Block) -> list[str]:
    """Return the lines of a shell block, continued lines joined, comments removed."""
    joined = re.sub(r"\\\n\s*", "", block.text)
    lines = (re.sub(r"(^|\s)#.*$", "", line).strip() for line in joined.splitlines())
    return [line for line in lines if line]
