"""The real server is killed in the middle of shard writes and comes back: the writes survive by our own retries."""

import multiprocessing
import time
from collections.abc import Iterator

import pytest

from functa.storage.errors import TransientError
from functa.storage.functaset.commit import commit
from functa.storage.functaset.functaset import Functaset
from functa.storage.places.location import Location
from functa.storage.places.s3_retries import PATIENCE_SECONDS
from functa.storage.upkeep.verify import verify
from tests.helpers.storage.ceph import Ceph
from tests.helpers.storage.functasets import fill, new_store, plan, tree, write
from tests.helpers.storage.locations import new_bucket

pytestmark = [pytest.mark.s3, pytest.mark.faults]
ROWS = 160  # in 20 shards, so that the outage comes in their middle


@pytest.fixture
def bucket(ceph: Ceph) -> Iterator[str]:
    with new_bucket(ceph.environment()) as name:
        yield f"s3://{name}"


def _write_all(place: Location) -> float:
    each = plan(place, n=ROWS)
    slowest = 0.0
    for shard in range(each.shards):
        begun = time.monotonic()
        write(place, each, shard)
        slowest = max(slowest, time.monotonic() - begun)
    commit(place, [each.id])
    return slowest


def test_an_outage_of_20_s_in_the_middle_of_shard_writes_is_survived(bucket: str, ceph: Ceph) -> None:
    reference = new_store(f"{bucket}/reference")
    fill(reference, [plan(reference, n=ROWS)])
    place = new_store(f"{bucket}/s")
    each = plan(place, n=ROWS)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        writer = pool.apply_async(_write_all, [place])
        while len(place.list(f"{each.path}/receipts/")) < 3:
            assert not writer.ready()
            time.sleep(0.05)
        ceph.kill_gateway()
        try:
            writer.wait(20)
            assert not writer.ready(), writer.get()
        finally:
            ceph.start_gateway()
        slowest = writer.get(timeout=120)
    assert 10 < slowest < PATIENCE_SECONDS + 30
    assert tree(f"{bucket}/s") == tree(f"{bucket}/reference")
    assert verify(place, deep=True).bad == []
    assert len(Functaset.open(place).load("train")) == ROWS


def test_an_outage_without_end_is_one_line_and_a_transient_error(bucket: str, ceph: Ceph) -> None:
    place = new_store(f"{bucket}/s")
    each = plan(place)
    ceph.kill_gateway()
    try:
        begun = time.monotonic()
        with pytest.raises(TransientError, match=r"the endpoint does not answer .*; start it"):
            write(place, each, 0)
        assert 25 < time.monotonic() - begun < PATIENCE_SECONDS + 15
    finally:
        ceph.start_gateway()
    assert write(place, each, 0).rows == 8
