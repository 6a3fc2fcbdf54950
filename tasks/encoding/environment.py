"""What latents were computed with: recorded beside them, never refused (design section 6)."""

from importlib.metadata import version

import torch

from models.inner import InnerLoop


def environment(loop: InnerLoop) -> dict[str, str]:
    """Versions of what computes and stores, device, threads, compiled or eager."""
    device = next(loop.field.parameters()).device
    named = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {name: version(name) for name in ("torch", "numpy", "zarr")} | {
        "device": named,
        "threads": str(torch.get_num_threads()),
        "mode": "compiled" if loop.compiled else "eager",
    }
