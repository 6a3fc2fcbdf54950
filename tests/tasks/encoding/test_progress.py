"""Progress lines of an encoding run; a store that does not answer for a while does not end it."""

from pathlib import Path
from typing import Any

import pytest

from functa.storage.errors import TransientError
from functa.storage.places.local import LocalLocation
from functa.tasks.dispatch import progress
from functa.tasks.encoding import progress as following
from functa.tasks.encoding.plan import Planned, ShardGroup
from functa.tasks.encoding.progress import Following, encoding_speed

PLANNED = Planned(
    groups=tuple(ShardGroup(fragment="f", split="train", shards=(n, n + 1), images=20) for n in (0, 2)),
    fragments=("f",),
)
STATS: dict[str, Any] = {"images": 20, "bad": 1, "psnr": 19 * 30.0, "begun": 100.0, "seconds": 5.0}


class Clock:
    """A clock that the test sets."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(following, "time", clock)
    monkeypatch.setattr(progress, "time", clock)
    return clock


class Shown:
    """Collects lines in place of the log and the artifact."""

    def __init__(self, key: str, description: str) -> None:
        self.rows: list[tuple[int, int, str]] = []

    def show(self, *row: Any) -> None:
        self.rows.append(row)


def followed(store: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Following, list[tuple[int, int, str]]]:
    monkeypatch.setattr(following, "Progress", Shown)
    follow = Following(str(store), PLANNED)
    return follow, follow._progress.rows  # type: ignore[attr-defined]


def receipt(store: Path, shard: int) -> None:
    place = store / "fragments" / "f" / "receipts" / f"{shard:06d}.0.json"
    place.parent.mkdir(parents=True, exist_ok=True)
    place.touch()


def test_a_line_shows_rate_psnr_bad_inputs_and_the_time_left_without_the_first_shard(
    clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    receipt(tmp_path, 0)  # of an earlier run: not part of the rate
    follow, rows = followed(tmp_path, monkeypatch)
    clock.now = 10.0
    follow([])
    receipt(tmp_path, 1)
    clock.now = 20.0
    follow([STATS])
    clock.now = 22.0
    follow([STATS])  # too soon after the last line
    receipt(tmp_path, 2)
    clock.now = 40.0
    follow([STATS])
    receipt(tmp_path, 3)
    follow([STATS, STATS | {"bad": 0, "psnr": 20 * 31.0}])  # the last line is always shown
    assert rows == [
        (1, 4, "1 of 4 shards, 0 bad inputs"),
        (2, 4, "2 of 4 shards, PSNR 30.00 dB, 1 bad input"),  # its time is mostly start-up
        (3, 4, "3 of 4 shards, 0.5 images/s, PSNR 30.00 dB, 1 bad input, 0:20 left"),
        (4, 4, "4 of 4 shards, 1 images/s, PSNR 30.51 dB, 1 bad input"),
    ]


def test_a_store_that_does_not_answer_is_read_again_later(
    clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: object) -> list[str]:
        raise TransientError("timeout")

    receipt(tmp_path, 0)
    with monkeypatch.context() as broken:
        broken.setattr(LocalLocation, "list", away)
        follow, rows = followed(tmp_path, monkeypatch)
        clock.now = 10.0
        follow([])
        assert rows == []
    clock.now = 20.0
    follow([])
    receipt(tmp_path, 1)
    clock.now = 30.0
    follow([])
    assert [line for _, _, line in rows] == [
        "1 of 4 shards, 0 bad inputs",
        "2 of 4 shards, 1 images/s, 0 bad inputs, 0:20 left",
    ]


def test_the_rate_is_of_all_groups_from_the_first_start_to_the_last_end() -> None:
    stats = [STATS, STATS | {"begun": 103.0, "seconds": 7.0}, STATS | {"images": 0, "begun": 500.0}]
    assert encoding_speed(stats) == {"encode_images_per_s": 4.0}
    assert encoding_speed([]) == {}


def test_a_few_new_images_do_not_replace_the_rate_of_the_whole_run() -> None:
    few, before = [STATS | {"images": 3}], {"encode_images_per_s": 4.0, "bad_inputs": []}
    assert encoding_speed(few, before) == {"encode_images_per_s": 4.0}
    assert encoding_speed(few, {}) == {}
