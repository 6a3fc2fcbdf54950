"""Run our code and the JAX peer in turns, one process each, so that a change in the machine's speed affects both."""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from functa.models.config import FieldConfig, InnerConfig
from functa.models.field.cost import encode_passes, forward_flops, outer_passes

SIDE = Path(__file__).with_name("side.py")
PRECISIONS = ("float32", "bf16", "fp16")  # tf32 is float32 on a CPU
PASSES = {"encode": 6, "meta": 21}  # of the method as written: GFLOP/s counts these on both sides


class Side:
    """A process that works on request."""

    def __init__(self, job: dict[str, Any]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(SIDE), json.dumps(job)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.prepared = self._answer()

    def turn(self, seconds: float) -> dict[str, Any]:
        """Let the process work for this time; return its answer."""
        assert self._process.stdin
        self._process.stdin.write(f"{seconds}\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{SIDE.name} ended with status {self._process.wait()}; its output is above")
        return dict(json.loads(line))

    def end(self) -> None:
        """End the process by closing its input."""
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()


def arguments(mode: str, batch: int, description: str) -> argparse.Namespace:
    """Return the options of both benchmarks; defaults are the CIFAR-10 field of Table 4."""
    parser = argparse.ArgumentParser(description=description)
    sizes = {"spatial": 8, "channels": 16, "width": 256, "depth": 6, "batch": batch, "resolution": 32, "chunk": 2048}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--w0", type=float, default=10.0)
    parser.add_argument("--loss", choices=["image", "patch"], default="image", help="image: as the peer's default")
    parser.add_argument("--precision", default="float32,bf16", help="one or several, with commas")
    parser.add_argument("--alternations", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=6.0, help="of each turn")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    options = parser.parse_args()
    if unknown := set(options.precision.split(",")) - {*PRECISIONS}:
        parser.error(f"--precision takes {', '.join(PRECISIONS)}, not {', '.join(sorted(unknown))}")
    if options.resolution % options.spatial:
        parser.error(f"--spatial {options.spatial} does not divide --resolution {options.resolution}")
    if options.alternations < 1 or options.batch < 1:
        parser.error("--alternations and --batch are 1 at least")
    options.mode = mode
    return options


def compare(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return one row for every precision: medians over the turns, ratios turn by turn."""
    names = ("spatial", "channels", "width", "depth", "w0", "batch", "resolution", "chunk", "loss")
    config = {name: getattr(options, name) for name in names} | {"compiled": not options.eager}
    with tempfile.TemporaryDirectory() as folder:
        job = {"mode": options.mode, "folder": folder, "config": config}
        sides = {"peer": Side(job | {"side": "peer", "precision": "float32"})}
        for precision in options.precision.split(","):
            sides[precision] = Side(job | {"side": "ours", "precision": precision})
        turns = [
            {name: side.turn(options.seconds) for name, side in sides.items()} for _ in range(options.alternations)
        ]
        for side in sides.values():
            side.end()
    return [_row(options.mode, config, name, sides, turns) for name in sides if name != "peer"]


def _row(
    mode: str, config: dict[str, Any], name: str, sides: dict[str, Side], turns: list[dict[str, Any]]
) -> dict[str, Any]:
    def rate(side: str, clock: str) -> list[float]:
        return [config["batch"] * turn[side]["calls"] / turn[side][clock] for turn in turns]

    field = FieldConfig(**{k: config[k] for k in ("spatial", "channels", "width", "depth", "w0")})
    gflop = PASSES[mode] * forward_flops(field, (config["resolution"],) * 2, 3) / 1e9
    inner = InnerConfig(loss=config["loss"])
    pixels = config["resolution"] ** 2
    executed = encode_passes(inner, psnr=False) if mode == "encode" else outer_passes(field, inner, pixels)
    ours, peer = rate(name, "elapsed"), rate("peer", "elapsed")
    ratios = [a / b for a, b in zip(ours, peer)]
    return {
        "name": mode, "config": config, "precision": name, "images_per_s": round(median(ours), 2),
        "images_per_cpu_s": round(median(rate(name, "cpu")), 2), "gflop_per_s": round(gflop * median(ours), 1),
        "passes": PASSES[mode], "passes_executed": executed,
        "matmul_gflop_per_s": round(median(turn[name]["matmul_gflop_per_s"] for turn in turns), 1),
        "peer": "jax", "peer_images_per_s": round(median(peer), 2),
        "peer_images_per_cpu_s": round(median(rate("peer", "cpu")), 2),
        "ratio": round(median(ratios), 2), "ratios": [round(ratio, 2) for ratio in ratios],
        "peak_rss_mb": turns[-1][name]["peak_rss_mb"], "peer_peak_rss_mb": turns[-1]["peer"]["peak_rss_mb"],
        "latents_differ": sides[name].prepared["latents_differ"], "alternations": len(turns), "cpus": os.cpu_count(),
        "cpu": _processor(), "versions": sides[name].prepared["versions"] | sides["peer"].prepared["versions"],
    }  # fmt: skip


def _processor() -> str:
    """Return the processor's name and whether it multiplies bf16."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    wide = any("avx512_bf16" in line for line in lines)
    return model + (", avx512_bf16" if wide else "")
