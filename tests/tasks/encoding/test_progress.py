"""What is told of an encoding run on the way: its line, and that nobody who is away for a while ends it."""

from pathlib import Path
from typing import Any

import pytest

from functa.storage.errors import TransientError
from functa.storage.places.local import LocalLocation
from functa.tasks.encoding import progress as following
from functa.tasks.encoding.plan import Planned, ShardGroup
from functa.tasks.encoding.progress import Following, encoding_speed

PLANNED = Planned(
    groups=tuple(ShardGroup(fragment="f", split="train", shards=(n, n + 1), images=20) for n in (0, 2)),
    fragments=("f",),
)
STATS: dict[str, Any] = {"images": 20, "bad": 1, "psnr": 19 * 30.0, "begun": 100.0, "seconds": 5.0}


class Clock:
    """A time that passes when it is told to."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(following, "time", clock)
    return clock


class Told:
    """In place of the log and the artifact."""

    def __init__(self, key: str, description: str) -> None:
        self.rows: list[tuple[int, int, str]] = []

    def show(self, *row: Any) -> None:
        self.rows.append(row)


def followed(store: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Following, list[tuple[int, int, str]]]:
    monkeypatch.setattr(following, "Progress", Told)
    told = Following(str(store), PLANNED)
    return told, told._progress.rows  # type: ignore[attr-defined]


def receipt(store: Path, shard: int) -> None:
    place = store / "fragments" / "f" / "receipts" / f"{shard:06d}.0.json"
    place.parent.mkdir(parents=True, exist_ok=True)
    place.touch()


def test_a_line_tells_rate_psnr_bad_inputs_and_the_time_left(
    clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    receipt(tmp_path, 0)  # of an earlier run: no part of the rate
    told, rows = followed(tmp_path, monkeypatch)
    clock.now = 10.0
    told([])
    receipt(tmp_path, 1)
    clock.now = 20.0
    told([STATS])
    clock.now = 22.0
    told([STATS])  # too soon after the last one
    for shard in (2, 3):
        receipt(tmp_path, shard)
    told([STATS, STATS | {"bad": 0, "psnr": 20 * 31.0}])  # the last one always
    assert rows == [
        (1, 4, "1 of 4 shards, 0 bad inputs"),
        (2, 4, "2 of 4 shards, 0 images/s, PSNR 30.00 dB, 1 bad inputs, 0:40 left"),
        (4, 4, "4 of 4 shards, 1 images/s, PSNR 30.51 dB, 1 bad inputs"),
    ]


def test_a_store_that_is_away_for_a_while_is_looked_at_again(
    clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: object) -> list[str]:
        raise TransientError("timeout")

    receipt(tmp_path, 0)
    with monkeypatch.context() as broken:
        broken.setattr(LocalLocation, "list", away)
        told, rows = followed(tmp_path, monkeypatch)
        clock.now = 10.0
        told([])
        assert rows == []
    clock.now = 20.0
    told([])
    receipt(tmp_path, 1)
    clock.now = 30.0
    told([])
    assert [line for _, _, line in rows] == [
        "1 of 4 shards, 0 bad inputs",
        "2 of 4 shards, 0 images/s, 0 bad inputs, 1:00 left",
    ]


def test_the_speed_is_that_of_all_groups_from_the_first_begin_to_the_last_end() -> None:
    stats = [STATS, STATS | {"begun": 103.0, "seconds": 7.0}, STATS | {"images": 0, "begun": 500.0}]
    assert encoding_speed(stats) == {"encode_images_per_s": 4.0}
    assert encoding_speed([]) == {}


def test_a_few_newcomers_do_not_replace_the_rate_of_all() -> None:
    few, before = [STATS | {"images": 3}], {"encode_images_per_s": 4.0, "bad_inputs": []}
    assert encoding_speed(few, before) == {"encode_images_per_s": 4.0}
    assert encoding_speed(few, {}) == {}
