"""Time training steps of classifiers and denoisers, compiled and eager, beside the plainest loop: JSON.

    python benchmarks/train.py                              # every preset's, small batches of the large ones on a CPU
    python benchmarks/train.py --presets digits --seconds 5

Steps are the pipeline's own (tasks/training/loop.py) on one batch of random latents in memory: benchmarks/store.py
measures reading. The plainest loop is float32, eager, torch's optimiser with its defaults, the loss read at every
step. Sides take turns; rates are medians, ratios are of turns. A preset's batch is cut until a
forward pass takes at most --gflop.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
import torch
from torch import Tensor

from functa.flows.config.load import load_config
from functa.flows.config.presets import preset_names
from functa.flows.config.schema import PipelineConfig
from functa.models.latents.classifier import classification_loss, decay_groups
from functa.models.latents.diffusion import Draw, diffusion_loss, draw, training_process
from functa.storage.images.sources import known_shape
from functa.storage.places.address import open_location
from functa.tasks.training import loop
from functa.tasks.training.classifier import classifier_learner
from functa.tasks.training.diffusion import diffusion_learner
from functa.tasks.training.learner import Learner, Run
from functa.tasks.training.ranks import Ranks

KINDS = ("classifier", "diffusion")
CLASSES = 10


class Piece:
    """One training of one preset, with a batch that this machine can compute."""

    def __init__(self, config: PipelineConfig, kind: str, options: argparse.Namespace) -> None:
        self.kind, self.name, self.shape = kind, config.name, config.field.latent_shape
        section = getattr(config, kind)
        found = known_shape(config.images)[2] or (1000 if "imagenet" in config.name else CLASSES)
        self.classes = found if kind == "classifier" or section.process.conditional else None
        self.device = torch.device(options.device)
        self.ranks = Ranks(device=self.device)
        update: dict[str, Any] = {"warmup": 0, "decay": "constant", "steps": 10**6}
        update |= {} if options.precision is None else {"precision": options.precision}
        section = section.model_copy(update=update | {"batch": 1})
        one = self.learner(section, "off").work.flops / 3  # a forward pass of one example
        batch = max(2, min(getattr(config, kind).batch, int(options.gflop * 1e9 / one)))
        self.config = section.model_copy(update={"batch": batch})
        self.flops = 3 * one * batch

    def learner(self, section: Any, compilation: str) -> Learner:
        """Return the pipeline's learner."""
        section = section.model_copy(update={"compile": compilation})
        z = torch.randn(section.batch, *self.shape, device=self.device)
        labels = torch.randint(0, self.classes or CLASSES, (section.batch,), device=self.device)
        make: Any = classifier_learner if self.kind == "classifier" else diffusion_learner
        return make(section, self.shape, self.classes, lambda step: (z, labels), self.ranks, seed=0)  # type: ignore[no-any-return]

    def ours(self, compilation: str) -> tuple[Callable[[], Any], Learner]:
        """Return one step of the pipeline's loop, and its learner."""
        learner = self.learner(self.config, compilation)
        run = Run(
            stage=self.kind, config=self.config, seed=0, learner=learner, output=open_location("."), metadata={},
            ranks=self.ranks,
        )  # fmt: skip
        averages, watch, stop = loop._Averages(run), loop._Watch(run), loop._Stop()
        learner.model.train()
        steps = iter(range(10**6))
        return lambda: loop._update(run, averages, next(steps), stop, watch), learner

    def plain(self) -> Callable[[], float]:
        """Return one step of the plainest loop."""
        plain = self.config.model_copy(update={"precision": "float32"})
        model = self.learner(plain, "off").model.train()
        z = torch.randn(plain.batch, *self.shape, device=self.device)
        labels = torch.randint(0, self.classes or CLASSES, (plain.batch,), device=self.device)
        if self.kind == "classifier":
            optimizer: torch.optim.Optimizer = torch.optim.AdamW(decay_groups(model, plain.weight_decay), lr=1e-3)
        else:
            optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
            process = training_process(plain.process, self.device)
        generator = torch.Generator(self.device).manual_seed(0)

        def loss() -> Tensor:
            if self.kind == "classifier":
                return classification_loss(model(z), labels, plain.label_smoothing)
            drawn: Draw = draw(plain.process, z.shape, generator)
            return diffusion_loss(model, process, z, labels if self.classes else None, drawn, self.classes)

        def step() -> float:
            optimizer.zero_grad()
            value = loss()
            value.backward()
            optimizer.step()
            return value.item()

        return step


def rate(step: Callable[[], Any], device: torch.device, seconds: float) -> float:
    """Measure steps per second, with one step at least."""
    _wait(device)
    begun, count = time.perf_counter(), 0
    while not count or time.perf_counter() - begun < seconds:
        step()
        count += 1
        _wait(device) if count == 1 else None
    _wait(device)
    return count / (time.perf_counter() - begun)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(piece: Piece, options: argparse.Namespace) -> dict[str, Any]:
    """Return a row: steps/s of each side, and their share of the device's matmul rate."""
    sides: dict[str, Callable[[], Any]] = {}
    compiled, learner = piece.ours(options.compile)
    sides["compiled"], sides["eager"], sides["plain"] = compiled, piece.ours("off")[0], piece.plain()
    begun = time.perf_counter()
    compiled()
    compiling = time.perf_counter() - begun
    for step in sides.values():
        step()
    turns = [
        {side: rate(step, piece.device, options.seconds) for side, step in sides.items()}
        for _ in range(options.alternations)
    ]
    steps = {side: median(turn[side] for turn in turns) for side in sides}
    peak = median(piece.learner(piece.config, "off").work.peak for _ in range(3))
    return {
        "name": "train", "piece": piece.kind,
        "config": {"preset": piece.name, "latent": "x".join(map(str, piece.shape)), "batch": piece.config.batch},
        "parameters": sum(p.numel() for p in learner.model.parameters()), "precision": piece.config.precision,
        "gflop_per_example": round(piece.flops / piece.config.batch / 1e9, 3), "mode": learner.mode,
        "steps_per_s": {side: round(value, 3) for side, value in steps.items()},
        "images_per_s": round(steps["compiled"] * piece.config.batch, 1),
        "utilization": {side: round(value * piece.flops / peak, 3) for side, value in steps.items()},
        "matmul_gflop_per_s": round(peak / 1e9, 1), "peer": "the plainest loop, float32",
        "ratio": round(median(turn["compiled"] / turn["plain"] for turn in turns), 2),
        "over_eager": round(median(turn["compiled"] / turn["eager"] for turn in turns), 2),
        "compile_s": round(compiling, 1), "alternations": len(turns), "device": _device_name(piece.device),
    }  # fmt: skip


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", help="names, separated by commas; default: all that have either")
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--precision", choices=("float32", "tf32", "bf16"), help="default: the preset's")
    parser.add_argument("--compile", default="on", choices=("on", "graphs"))
    parser.add_argument("--gflop", type=float, help="of a batch's forward pass at most; default: 100 on a CPU")
    parser.add_argument("--seconds", type=float, default=3.0, help="of a turn of one side, one step at least")
    parser.add_argument("--alternations", type=int, default=5)
    options = parser.parse_args()
    options.gflop = options.gflop or (100.0 if options.device == "cpu" else 1e9)
    names = options.presets.split(",") if options.presets else preset_names()
    rows, seen = [], set()
    for config in map(load_config, names):
        for kind in options.kinds.split(","):
            section = getattr(config, kind)
            same = (
                kind,
                config.field.latent_shape,
                section and section.model.model_dump_json(),
                section and section.batch,
            )
            if section is None or same in seen:  # presets that share a model
                continue
            seen.add(same)
            try:
                rows.append(measure(Piece(config, kind, options), options))
            except torch.OutOfMemoryError as error:  # three copies of a large model: what does not fit is reported
                rows.append({"name": "train", "piece": kind, "preset": config.name, "error": str(error).split(". ")[0]})
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
