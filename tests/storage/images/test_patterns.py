"""Patterns of images.location."""

from pathlib import Path

import pytest

from functa.storage.images.patterns import select


@pytest.mark.parametrize(
    ("pattern", "matched"),
    [
        ("?", ["a/1.png"]), (".*", []), ("{a,bb}", ["a/1.png", "bb/2.png"]), ("{a,bb}/", ["a/1.png", "bb/2.png"]),
        ("b*", ["bb/2.png"]), ("*/{1..2}.png", ["a/1.png", "bb/2.png"]), ("{a,b?}/*.png", ["a/1.png", "bb/2.png"]),
        ("*.png", ["3.png"]),
    ],
)  # fmt: skip
def test_a_pattern_names_files_or_folders_of_its_own_depth(pattern: str, matched: list[str], tmp_path: Path) -> None:
    for key in ("a/1.png", "bb/2.png", "3.png"):
        (tmp_path / key).parent.mkdir(exist_ok=True)
        (tmp_path / key).write_bytes(b"x")
    assert [entry.key for entry in select(f"{tmp_path}/{pattern}")[1]] == matched
