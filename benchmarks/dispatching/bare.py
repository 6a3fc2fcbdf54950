"""Bare processes that encode: what workers are compared with. As a script, one of them, by its standard input."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.dispatching.rates import Groups, Stats

if TYPE_CHECKING:
    from functa.tasks.encoding.plan import EncodeJob


def encode_bare(job: "EncodeJob", groups: Groups, images: int) -> Stats:
    """Encode the groups one after the other, in this process."""
    from functa.tasks.encoding.encode import encode_group

    return [encode_group(job, group, images, run="bare") for group in groups]


def encode_bare_from(text: str) -> Stats:
    """Run encode_bare on a job and groups given as a line of JSON."""
    from functa.tasks.encoding.plan import EncodeJob, ShardGroup

    given = json.loads(text)
    groups = [ShardGroup.model_validate(group) for group in given["groups"]]
    return encode_bare(EncodeJob.model_validate(given["job"]), groups, given["images"])


def side_by_side(job: "EncodeJob", groups: Groups, processes: int) -> Stats:
    """Encode in bare processes of one thread each; every process gets its groups beforehand."""
    images = sum(group.images for group in groups)
    shares = [groups[number::processes] for number in range(processes)]
    children = [
        subprocess.Popen(
            [sys.executable, __file__], env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for _ in shares
    ]  # fmt: skip
    for child, share in zip(children, shares):
        assert child.stdin
        described = [group.model_dump(mode="json") for group in share]
        child.stdin.write(json.dumps({"job": job.model_dump(mode="json"), "groups": described, "images": images}))
        child.stdin.close()
    stats: Stats = [{}] * len(groups)
    for number, child in enumerate(children):
        assert child.stdout
        answer = child.stdout.read()
        if child.wait():
            raise SystemExit(f"a bare process ended with status {child.returncode}; its output is above")
        stats[number::processes] = json.loads(answer)
    return stats


if __name__ == "__main__":
    print(json.dumps(encode_bare_from(sys.stdin.read())))
