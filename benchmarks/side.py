"""Run one side of a comparison in its own process: prepare, then work only on request.

    python benchmarks/side.py '{"side": "ours", "mode": "encode", "folder": ..., "precision": "bf16", "config": {...}}'

For each line `SECONDS` on standard input it calls its function for that long and prints one JSON line. Preparation
(compiling included) is not timed. Both sides work on the same images and parameters: the peer draws them and writes
them into the folder.
"""

import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
import numpy as np

DATA = "peer.npz"
MATMUL_ROWS, MATMUL_SECONDS = 16384, 1.0


def prepare_peer(job: dict[str, Any]) -> tuple[Callable[[], Any], dict[str, Any]]:
    """Return the peer's jitted call, built like in its own main."""
    import jax
    import jax.numpy as jnp

    from benchmarks.peer import load_peer, peer_arguments

    peer, a = load_peer(), peer_arguments(job["config"])
    key = jax.random.PRNGKey(0)
    parameters, x = peer.init(key, a), peer.coordinates(a)
    images = jax.random.uniform(jax.random.fold_in(key, 1), (a.batch, a.resolution, a.resolution, 3))
    encode = jax.jit(lambda p, i: peer.encode(p, i, x, a))
    named = {f"{k}{i}": v for k in ("w", "b") for i, v in enumerate(parameters[k])}
    named |= {k: parameters[k] for k in ("lam", "lam_b", "lrs")}
    arrays = {"images": images, "z": encode(parameters, images), **named}
    np.savez(Path(job["folder"], DATA), **{k: np.asarray(v) for k, v in arrays.items()})
    if job["mode"] == "encode":
        return lambda: jax.block_until_ready(encode(parameters, images)), {"versions": {"jax": jax.__version__}}
    zeros = jax.tree_util.tree_map(jnp.zeros_like, parameters)
    state = {"mu": zeros, "nu": zeros, "count": 0}
    step = jax.jit(lambda p, s, i: peer.meta_step(p, s, i, x, a))
    return lambda: jax.block_until_ready(step(parameters, state, images)), {"versions": {"jax": jax.__version__}}


def prepare_ours(job: dict[str, Any]) -> tuple[Callable[[], Any], dict[str, Any]]:
    """Return our call, after a check that its latents equal the peer's."""
    import torch

    from benchmarks.peer import our_field
    from functa.models.compute.compilation import missing
    from functa.models.config import InnerConfig
    from functa.models.field.inner import InnerLoop

    config, arrays = job["config"], dict(np.load(Path(job["folder"], DATA)))
    if config["compiled"] and (lacking := missing(torch.device("cpu"))):
        raise SystemExit(
            f"compiling needs {', '.join(lacking)}: apt-get install {' '.join(lacking.values())}, or --eager"
        )
    inner = InnerConfig(loss=config["loss"], rates="channel", precision=job["precision"], chunk=config["chunk"])
    field = our_field(config, inner, arrays)
    images = torch.from_numpy(arrays["images"])
    loop = InnerLoop(field, inner, (config["resolution"],) * 2, compiled=config["compiled"])
    if job["precision"] != "float32":  # the method must be equal in full precision before it is timed in fewer bits
        few = min(2, len(images))
        exact = InnerLoop(field, inner.model_copy(update={"precision": "float32"}), loop.resolution)
        difference_of(exact.encode(images[:few]).numpy(), arrays["z"][:few], allowed=1e-4)
    allowed = 1e-4 if job["precision"] == "float32" else 2e-2
    difference = difference_of(loop.encode(images).numpy(), arrays["z"], allowed)
    prepared = {
        "latents_differ": difference,
        "versions": {"torch": torch.__version__},
        "threads": torch.get_num_threads(),
    }
    if job["mode"] == "encode":
        return lambda: loop.encode(images), prepared
    optimizer = torch.optim.Adam(field.parameters(), lr=3e-5)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loop.outer_backward(images)
        optimizer.step()

    return step, prepared


def difference_of(ours: np.ndarray, peers: np.ndarray, allowed: float) -> float:
    """Return the norm of the difference over the peer's norm. Raises SystemExit if it is more than allowed."""
    difference = float(np.linalg.norm(ours - peers) / np.linalg.norm(peers))
    if not difference <= allowed:
        raise SystemExit(f"latents differ from the peer's by {difference:.1e} in norm, more than {allowed:g}")
    return difference


def matmul_rate(width: int, precision: str) -> float:
    """Measure GFLOP/s of one [16384, W] x [W, W] product at this precision."""
    import torch

    kind = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    a, b = torch.randn(MATMUL_ROWS, width).to(kind), torch.randn(width, width).to(kind)
    a @ b
    calls, begun = 0, time.perf_counter()
    while time.perf_counter() - begun < MATMUL_SECONDS:
        a @ b
        calls += 1
    return calls * 2 * MATMUL_ROWS * width**2 / (time.perf_counter() - begun) / 1e9


def turn(call: Callable[[], Any], seconds: float) -> dict[str, float]:
    """Repeat the call for this time, at least once; return {calls, elapsed and CPU seconds}."""
    calls, begun, cpu = 0, time.perf_counter(), time.process_time()
    while not calls or time.perf_counter() - begun < seconds:
        call()
        calls += 1
    return {"calls": calls, "elapsed": time.perf_counter() - begun, "cpu": time.process_time() - cpu}


def main() -> None:
    job = json.loads(sys.argv[1])
    call, prepared = (prepare_ours if job["side"] == "ours" else prepare_peer)(job)
    call()
    print(json.dumps(prepared), flush=True)
    for line in sys.stdin:
        answer: dict[str, Any] = dict(turn(call, float(line)))
        answer["peak_rss_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        if job["side"] == "ours":
            answer["matmul_gflop_per_s"] = matmul_rate(job["config"]["width"], job["precision"])
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
