"""The benchmark of dispatch: its rates in closed form, and the whole of it on something small."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.dispatching.rates import between_groups, lanes, steady_rate
from tests.helpers.benchmark_script import answer


def encoded(store: Path, groups: list[tuple[float, list[float]]], rows: int) -> tuple[Any, Any]:
    """Stats and groups of so many rows a shard: (seconds when it began, seconds when each shard was written)."""
    stats, planned, shard = [], [], 0
    receipts = store / "fragments" / "f" / "receipts"
    receipts.mkdir(parents=True)
    for begun, ends in groups:
        planned.append(SimpleNamespace(fragment="f", shards=list(range(shard, shard + len(ends)))))
        stats.append({"begun": begun, "images": rows * len(ends)})
        for end in ends:
            path = receipts / f"{shard:06d}.0.json"
            path.write_text("{}")
            os.utime(path, (end, end))
            shard += 1
    return stats, planned


def test_a_rate_is_that_of_the_time_in_which_every_worker_is_busy(tmp_path: Path) -> None:
    one = [(0.0, [11.0, 12.0, 13.0]), (13.0, [14.0, 15.0, 17.0])]  # ten seconds of start-up, then a shard a second
    other = [(5.0, [12.0, 14.0, 16.0]), (16.5, [18.0, 20.0, 22.0])]
    found = lanes(*encoded(tmp_path, one + other, rows=8), tmp_path)
    assert [[end for end, _ in lane] for lane in found] == [[11, 12, 13, 14, 15, 17], [12, 14, 16, 18, 20, 22]]
    assert steady_rate(found) == pytest.approx((4 + 2.5) * 8 / 5)  # from 12 to 17: both had written and were at work


def test_empty_time_between_groups_counts(tmp_path: Path) -> None:
    found = lanes(*encoded(tmp_path, [(0.0, [1.0, 2.0]), (6.0, [7.0, 8.0])], rows=14), tmp_path)
    assert len(found) == 1
    assert steady_rate(found) == pytest.approx(3 * 14 / 7)


def test_time_between_groups_is_counted_by_worker(tmp_path: Path) -> None:
    stats, groups = encoded(tmp_path, [(0.0, [4.0]), (1.0, [5.0]), (4.5, [8.0]), (5.25, [9.0])], rows=8)
    assert between_groups(stats, groups, tmp_path) == [0.5, 0.25]


SMALL = ["--preset", "digits", "--eager", "--seconds", "0.5", "--alternations", "1", "--set=images.channels=3",
         "--set=images.resolution=32", "--set=field.width=32"]  # fmt: skip


@pytest.mark.server
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_dask_workers_are_measured_beside_bare_processes() -> None:
    encoding = answer("dispatching/dask_workers", *SMALL)
    assert encoding["images_per_s"].keys() == {"bare", "two workers", "one worker"}
    assert encoding["ratio"] == pytest.approx(
        encoding["images_per_s"]["two workers"] / encoding["images_per_s"]["bare"], rel=0.01
    )


@pytest.mark.server
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_workers_of_a_pool_are_measured_beside_bare_processes() -> None:
    row = answer("dispatching/pool_workers", *SMALL, "--workers", "1", "--groups", "2")
    (turn,) = row["turns"]
    assert turn["pool"]["between_groups_s"] > 0
    assert turn["pool"]["cpu_s"] > turn["pool"]["server_cpu_s"] > 0
    assert row["ratio"] == pytest.approx(turn["pool"]["images_per_s"] / turn["bare"]["images_per_s"], rel=0.01)


@pytest.mark.server
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_empty_groups_are_measured_by_their_number() -> None:
    threads, dask = answer("dispatching/empty_groups", *SMALL, "--empty", "3,5")
    assert [row["runner"] for row in (threads, dask)] == ["threads", "dask"]
    assert threads["seconds_per_group"].keys() == {"3", "5"}
