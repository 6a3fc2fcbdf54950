"""Spatial functa: encode images into small latent grids, decode them, and train models on them.

The public Python API. Importing it is cheap: a name loads its module (and PyTorch or Prefect) when it is first used.

    import functa

    config = functa.load_config("digits")
    metrics = functa.run(config, "functa-runs/digits")        # train, encode, measure
    z = functa.encode("functa-runs/digits", images)           # [n, H, W, C] -> float32 [n, s, s, c]
    images = functa.decode("functa-runs/digits", z)           # and back: uint8 [n, H, W, C]
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from functa.flows.config.load import load_config
    from functa.flows.run import run
    from functa.storage.functaset.functaset import Functaset
    from functa.storage.readers.open import open_reader
    from functa.tasks.inference.arrays import classify, decode, encode, sample
    from functa.tasks.inference.open_models import load_classifier, load_denoiser, load_field

__version__ = "0.1.0"

__all__ = [
    "Functaset",
    "classify",
    "decode",
    "encode",
    "load_classifier",
    "load_config",
    "load_denoiser",
    "load_field",
    "open_reader",
    "run",
    "sample",
]

_MODULES = {
    "Functaset": "functa.storage.functaset.functaset",
    "classify": "functa.tasks.inference.arrays",
    "decode": "functa.tasks.inference.arrays",
    "encode": "functa.tasks.inference.arrays",
    "load_classifier": "functa.tasks.inference.open_models",
    "load_config": "functa.flows.config.load",
    "load_denoiser": "functa.tasks.inference.open_models",
    "load_field": "functa.tasks.inference.open_models",
    "open_reader": "functa.storage.readers.open",
    "run": "functa.flows.run",
    "sample": "functa.tasks.inference.arrays",
}


if not TYPE_CHECKING:  # a checker would take every name for one of the package's

    def __getattr__(name: str) -> Any:
        if name not in _MODULES:
            raise AttributeError(f"module 'functa' has no attribute '{name}'")
        value = getattr(importlib.import_module(_MODULES[name]), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
