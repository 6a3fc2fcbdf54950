"""Measure encoding and outer step on one GPU, by precision, beside the device's own matmul rate.

    python benchmarks/gpu.py --out gpu.jsonl --minutes 8     # again, until it prints that nothing is left
    python benchmarks/gpu.py --out gpu.jsonl --table         # Markdown for docs/results.md
    python benchmarks/gpu.py --out gpu.jsonl --cuda-graphs   # compiled pieces once more, launched as CUDA graphs

Every finished measurement is a line of the file; the next call continues after it. Needs only torch, numpy, pydantic.
`--device cpu` runs the same on one small image: a test of this file, not a measurement.
"""

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
import torch
import torch._inductor.config

from functa.models.config import FieldConfig, InnerConfig
from functa.models.field.cost import encode_passes, forward_flops, outer_passes
from functa.models.field.field import Field
from functa.models.field.inner import InnerLoop
from functa.models.field.passes import tensor_cores

# name: field, resolution, images per encoding call, images per outer step
PRESETS: dict[str, tuple[FieldConfig, int, int, int]] = {
    "cifar10_8x8x16": (FieldConfig(spatial=8, channels=16, width=256, depth=6), 32, 2048, 128),
    "cifar10_vector_1024": (FieldConfig(spatial=1, channels=1024, width=512, depth=15, w0=30), 32, 512, 128),
    "imagenet_16x16x128": (FieldConfig(spatial=16, channels=128, width=256, depth=12, w0=20), 256, 32, 16),
    "imagenet_32x32x64": (FieldConfig(spatial=32, channels=64, width=256, depth=8), 256, 32, 16),
    "imagenet_32x32x64_3x3": (FieldConfig(spatial=32, channels=64, width=256, depth=8, kernel=3), 256, 32, 16),
}
PRECISIONS = ("float32", "tf32", "bf16", "fp16")
CHUNKS = (1 << 17, 1 << 19, 1 << 21)  # pixels: the largest that memory takes is not always the fastest
HOWS = {
    "compiled": {"compiled": True, "graphs": False},
    "CUDA graphs": {"compiled": True, "graphs": True},
    "eager": {"compiled": False, "graphs": False},
}
ROWS = {"cuda": 65536, "cpu": 2048}
SECONDS = {"cuda": 3.0, "cpu": 0.0}  # at least one call
CPU_PATCH = 2  # pixels per side of a latent position in images for --device cpu
MODES = ("encode", "outer")


def rate(call: Callable[[], Any], device: str) -> float:
    """Return calls per second, after two warm-up calls."""
    for _ in range(2 if device == "cuda" else 1):
        call()
    _wait(device)
    calls, begun = 0, time.perf_counter()
    while time.perf_counter() - begun < SECONDS[device] or not calls:
        call()
        calls += 1
        _wait(device)
    return calls / (time.perf_counter() - begun)


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def matmul(precision: str, device: str) -> dict[str, Any]:
    """Measure FLOP/s of one [65536, 256] x [256, 256] product."""
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    a = torch.randn(ROWS[device], 256, device=device, dtype=kind)
    b = torch.randn(256, 256, device=device, dtype=kind)
    with tensor_cores(precision):
        return {"tflop_per_s": rate(lambda: a @ b, device) * 2 * ROWS[device] * 256**2 / 1e12}


def start_afresh(graphs: bool, device: str) -> None:
    """Free the graphs and memory of earlier pieces, so that their order and number do not change a measurement."""
    torch._dynamo.reset()
    torch._inductor.config.triton.cudagraphs = graphs
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def measure(
    name: str, mode: str, precision: str, compiled: bool, graphs: bool, chunk: int, device: str
) -> dict[str, Any]:
    """Measure images per second, FLOP/s and peak memory of one setting; return a reason if it is not available."""
    config, side, *batches = PRESETS[name]
    batch = batches[mode == "outer"]
    if device == "cpu":
        batch, side = 1, CPU_PATCH * config.spatial
    start_afresh(graphs, device)
    inner = InnerConfig(rates="element", precision=precision, chunk=chunk if device == "cuda" else 2048)
    field = Field(config, inner, 3, resolution=(side, side)).to(device)
    loop = InnerLoop(field, inner, (side, side), compiled)
    images = torch.rand(batch, side, side, 3, device=device)
    if mode == "encode":
        prepared = loop.prepared(1 << 20)
        images_per_s = batch * rate(lambda: prepared.encode(images), device)
    else:
        optimizer = torch.optim.Adam(field.parameters(), lr=1e-5)

        def step() -> None:
            optimizer.zero_grad(set_to_none=True)
            loop.outer_backward(images)
            optimizer.step()

        images_per_s = batch * rate(step, device)
    passes = outer_passes(config, inner, side * side) if mode == "outer" else encode_passes(inner, psnr=False)
    flops = passes * forward_flops(config, (side, side), 3) * images_per_s
    memory = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None
    return {"batch": batch, "images_per_s": images_per_s, "tflop_per_s": flops / 1e12, "memory_gib": memory}


def pieces(device: str, presets: list[str], hows: list[str]) -> list[dict[str, Any]]:
    """Return everything to measure, the project's targets first; `hows` are keys of HOWS."""
    rates: list[dict[str, Any]] = [{"piece": "matmul", "precision": precision} for precision in PRECISIONS]
    chunks = CHUNKS[:1] if device == "cpu" else CHUNKS
    settings = itertools.product(chunks, hows, ("bf16", "fp16", "tf32", "float32"), presets, MODES)
    return rates + [
        {"piece": "loop", "chunk": chunk, "precision": precision, "preset": preset, "mode": mode} | HOWS[how]
        for chunk, how, precision, preset, mode in settings
    ]


def run(piece: dict[str, Any], device: str) -> dict[str, Any]:
    """Return one piece's figures, or the error that ended it: out of memory is a result too."""
    torch.manual_seed(0)
    try:
        if piece["piece"] == "matmul":
            return matmul(piece["precision"], device)
        chosen = {k: piece[k] for k in ("mode", "precision", "compiled", "graphs", "chunk")}
        return measure(piece["preset"], device=device, **chosen)
    except (RuntimeError, ValueError) as error:
        return {"error": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}


def table(rows: list[dict[str, Any]]) -> str:
    """Return the fastest chunk of every setting, as Markdown."""
    device = rows[0]["device"] if rows else "nothing measured"
    matmuls = {r["precision"]: r["tflop_per_s"] for r in rows if r["piece"] == "matmul" and "tflop_per_s" in r}
    best: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        key = tuple(row.get(k) for k in ("preset", "mode", "precision", "compiled", "graphs"))
        if "images_per_s" in row and row["images_per_s"] > best.get(key, {"images_per_s": 0})["images_per_s"]:
            best[key] = row
    head = "| preset | mode | precision | | batch | chunk | images/s | TFLOP/s | of matmul | GiB |"
    lines = [f"{device}", "", head, "|-" * 10 + "|"]
    for (preset, mode, precision, compiled, graphs), r in sorted(best.items(), key=lambda item: str(item[0])):
        share = f"{r['tflop_per_s'] / matmuls[precision]:.0%}" if precision in matmuls else "?"
        memory = "?" if r["memory_gib"] is None else f"{r['memory_gib']:.1f}"
        how = next(name for name, how in HOWS.items() if how == {"compiled": compiled, "graphs": graphs})
        lines.append(
            f"| {preset} | {mode} | {precision} | {how} | {r['batch']} | {r['chunk']} | {r['images_per_s']:,.0f} "
            f"| {r['tflop_per_s']:.1f} | {share} | {memory} |"
        )
    failed = [row for row in rows if "error" in row]
    lines += [""] * bool(failed)
    for row in failed:
        piece = ", ".join(f"{key} {row[key]}" for key in ("preset", "mode", "precision", "chunk") if key in row)
        lines.append(f"- not measured: {piece or row['piece']}: {row['error']}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu.jsonl"))
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--presets", help="only these, with commas")
    parser.add_argument("--eager", action="store_true", help="leave out what is compiled")
    parser.add_argument("--retry-errors", action="store_true", help="measure again what ended with an error")
    parser.add_argument("--cuda-graphs", action="store_true", help="compiled pieces a second time, as CUDA graphs")
    options = parser.parse_args()
    rows = [json.loads(line) for line in options.out.read_text().splitlines()] if options.out.exists() else []
    if options.table:
        print(table(rows))
        return
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("torch sees no GPU here: nothing measured (--device cpu tests this file)")
    device = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
    chosen = options.presets.split(",") if options.presets else list(PRESETS)
    if unknown := set(chosen) - {*PRESETS}:
        parser.error(f"--presets takes {', '.join(PRESETS)}, not {', '.join(sorted(unknown))}")
    hows = [how for how, setting in HOWS.items() if not (options.eager and setting["compiled"])]
    hows = [how for how in hows if options.cuda_graphs or not HOWS[how]["graphs"]]
    left = [
        p
        for p in pieces(options.device, chosen, hows)
        if not any(
            p.items() <= row.items() and row["device"] == device and not (options.retry_errors and "error" in row)
            for row in rows
        )
    ]
    until = time.monotonic() + 60 * options.minutes
    for done, piece in enumerate(left):
        if time.monotonic() > until:
            print(f"{len(left) - done} pieces left: run it again")
            return
        row = piece | run(piece, options.device) | {"device": device, "torch": torch.__version__}
        with options.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)
    print("nothing is left to measure; --table shows it")


if __name__ == "__main__":
    main()
