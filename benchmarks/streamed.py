"""Time training steps on a streamed functaset beside one in memory: JSON, in CPU seconds of the whole process.

    python benchmarks/streamed.py                       # 8-bit latents of 8x8x16, warm files, about 2 minutes
    python benchmarks/streamed.py --rows 4000 --steps 5 --turns 1

Steps are the pipeline's own; both feeds read the same functaset and take turns. `feed` reads and normalises batches
without training. Ratios are of turns: the rate of the streamed side over that of the one in memory.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
import torch

from benchmarks.store import SHAPE, Store, latents
from functa.flows.config.load import load_config
from functa.models.config import NormalizationConfig
from functa.storage.functaset.functaset import Functaset
from functa.storage.readers.shards import SplitShards
from functa.storage.readers.streamed import Streamed
from functa.tasks.inputs.batches import Batches, FromStream, training_batches
from functa.tasks.inputs.latents import training_normalizer
from functa.tasks.training.classifier import classifier_learner
from functa.tasks.training.diffusion import diffusion_learner
from functa.tasks.training.ranks import Ranks

CLASSES = 10
FEEDS = ("memory", "streamed")


def feeds(functaset: Functaset, batch: int) -> dict[str, Batches]:
    """Return batches from memory and from a stream of the same rows."""
    normalizer = training_normalizer(functaset, NormalizationConfig(kind="scalar"))
    steps, ranks = 10**6, Ranks()
    memory = training_batches(functaset, normalizer, batch, 0, ranks=ranks, steps=steps, classes=CLASSES)
    reader = Streamed(SplitShards(functaset, "train"))
    streamed = FromStream(reader, normalizer, batch, 0, ranks, steps, CLASSES, one_each=False)
    return dict(zip(FEEDS, (memory, streamed), strict=True))


def step_of(kind: str, config: Any, batches: Batches) -> Callable[[int], Any]:
    """Return a function that does a training step, or only reads its batch."""
    if kind == "feed":
        return batches
    make = classifier_learner if kind == "classifier" else diffusion_learner
    learner = make(config, SHAPE, CLASSES, batches, Ranks(), 0)

    def step(number: int) -> None:
        learner.optimizer.zero_grad(set_to_none=True)
        learner.gradients(number, torch.Generator().manual_seed(number))
        learner.optimizer.step()

    return step


def measured(kind: str, functaset: Functaset, options: argparse.Namespace) -> dict[str, Any]:
    """Return images per CPU second of both feeds, and the ratio of turns."""
    config = None
    if kind != "feed":
        update = {"batch": options.batch, "compile": "off", "warmup": 0}
        config = getattr(load_config(options.preset, []), kind).model_copy(update=update)
    steps = {name: step_of(kind, config, batches) for name, batches in feeds(functaset, options.batch).items()}
    seconds: dict[str, list[float]] = {name: [] for name in FEEDS}
    for turn in range(options.turns + 1):  # the first one warms up
        for name in FEEDS:
            begun = time.process_time()
            for number in range(turn * options.steps, (turn + 1) * options.steps):
                steps[name](number)
            seconds[name].append(time.process_time() - begun)
    rates = {name: options.batch * options.steps / median(each[1:]) for name, each in seconds.items()}
    ratio = median(memory / streamed for memory, streamed in zip(seconds["memory"][1:], seconds["streamed"][1:]))
    return {f"{name}_images_per_s": round(rate, 1) for name, rate in rates.items()} | {"ratio": round(ratio, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="cifar10_quick")
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--shard-rows", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=20, help="of a turn")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--kinds", default="feed,classifier,diffusion")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        functaset = Store(Path(folder, "z"), latents(options.rows), 8, options).committed()
        figures = {kind: measured(kind, functaset, options) for kind in options.kinds.split(",")}
    config = {name: value for name, value in vars(options).items() if name != "kinds"}
    print(json.dumps({"name": "streamed", "config": config, "figures": figures}))


if __name__ == "__main__":
    main()
