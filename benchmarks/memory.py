"""Measure peak memory at 256x256: one outer step of the ImageNet preset, encoding 10 and 100 images; one JSON line.

    python benchmarks/memory.py                     # about 10 minutes on 2 cores
    python benchmarks/memory.py --resolution 64 --batch 2 --images 2,4

Each figure is the peak resident memory of a process of its own, libraries included.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import torch

from functa.models.config import FieldConfig, InnerConfig
from functa.models.field.field import Field
from functa.models.field.inner import InnerLoop

IMAGENET = FieldConfig(spatial=16, channels=128, width=256, depth=12, w0=20)  # App. C.3


def work(mode: str, images: int, options: argparse.Namespace) -> dict[str, float]:
    """Do one outer step over the images, or encode them a few at a time; return {mib, seconds}."""
    inner = InnerConfig(rates="element", precision=options.precision)
    side = options.resolution
    field = Field(IMAGENET, inner, 3, seed=0)
    loop = InnerLoop(field, inner, (side, side), compiled=not options.eager)
    generator = torch.Generator().manual_seed(0)
    begun = time.perf_counter()
    if mode == "outer":
        loop.outer_backward(torch.rand(images, side, side, 3, generator=generator))
        torch.optim.Adam(field.parameters()).step()
    else:
        loop = loop.prepared(images)
        for begin in range(0, images, options.encode_batch):
            batch = min(options.encode_batch, images - begin)
            loop.encode(torch.rand(batch, side, side, 3, generator=generator))
    seconds = time.perf_counter() - begun
    return {"mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024, "seconds": round(seconds, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--batch", type=int, default=16, help="images of the outer step")
    parser.add_argument("--images", default="10,100", help="images encoded, one run each")
    parser.add_argument("--encode-batch", type=int, default=5)
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        mode, images = options.only.split(":")
        print(json.dumps(work(mode, int(images), options)))
        return
    rows: dict[str, dict[str, float]] = {}
    for job in (f"outer:{options.batch}", *(f"encode:{n}" for n in options.images.split(","))):
        child = subprocess.run(
            [sys.executable, *sys.argv, "--only", job], stdout=subprocess.PIPE, text=True, check=True
        )  # each in a process of its own: a peak never falls again
        rows[job] = json.loads(child.stdout)
    config = IMAGENET.model_dump() | {"resolution": options.resolution, "precision": options.precision}
    print(json.dumps({"name": "memory", "config": config, "peak": rows}))


if __name__ == "__main__":
    main()
