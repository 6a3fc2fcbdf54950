"""A garbled line of a curve costs that point."""

from pathlib import Path

from functa.storage.places.address import open_location
from functa.storage.runs.curve import read_curve


def test_a_garbled_curve_keeps_its_good_rows(tmp_path: Path) -> None:
    lines = [b'{"step": 1, "loss": 2.0}', b'{"step": 2, "lo', b"\xff\xfe", b"[1]", b"null", b"{}", b'{"step": "x"}',
             b"[" * 100_000, b'{"step": 3, "loss": 1.0}']  # fmt: skip
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines))
    assert [row["step"] for row in read_curve(open_location(str(tmp_path)))] == [1, 3]
