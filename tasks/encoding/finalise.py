"""Finalising: every receipt is there, so the rows become visible in one commit."""

from typing import Any

from storage.commits import as_rows
from storage.committing import commit
from storage.fragments import read_receipt, sum_of_contents
from storage.functaset import Functaset
from storage.locations import open_location
from storage.plans import load_plan, plan_rows
from tasks.encoding.plan import EncodeJob, Planned
from tasks.encoding.repair import other_images
from tasks.training.pictures import refuse_too_many_bad


def finalise(job: EncodeJob, planned: Planned) -> dict[str, Any]:
    """Commits what was planned; {info: the functaset's, bad_inputs: [{key, reason}]}.

    Raises StorageError when more images are bad than images.max_bad_fraction allows, a shard is missing, or a repair
    came out with other images than it was to.
    """
    for fragment, content in planned.contents.items():
        _check_content(job, fragment, content)
    bad = [image for fragment in planned.fragments for image in _bad_images(job, fragment)]
    retire = {fragment: as_rows(ranges) for fragment, ranges in planned.retire.items()}
    commit(open_location(job.functaset), planned.fragments, retire, drop=planned.drop)
    return {"info": Functaset.open(job.functaset).info(), "bad_inputs": bad}


def _check_content(job: EncodeJob, fragment: str, content: str) -> None:
    location = open_location(job.functaset)
    plan = load_plan(location, fragment)
    receipts = [read_receipt(location, plan, shard) for shard in range(plan.shards)]
    if sum_of_contents(receipt.content for receipt in receipts if receipt is not None) != content:
        raise other_images(plan.replaces)


def _bad_images(job: EncodeJob, fragment: str) -> list[dict[str, str]]:
    location = open_location(job.functaset)
    plan = load_plan(location, fragment)
    bad: list[dict[str, str]] = []
    for shard in range(plan.shards):
        receipt = read_receipt(location, plan, shard)
        if receipt is None or not receipt.bad:
            continue
        keys = plan_rows(location, plan, shard).keys
        bad += [{"key": keys[row], "reason": reason} for row, reason in sorted(receipt.bad.items())]
    first = f"{bad[0]['key']}: {bad[0]['reason']}" if bad else ""
    refuse_too_many_bad(len(bad), plan.rows, job.images.max_bad_fraction, plan.split, first)
    return bad
