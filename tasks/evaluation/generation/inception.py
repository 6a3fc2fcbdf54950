"""The Inception network of FID: its weights' file, checked, and its features. Nothing is downloaded.

Free of torch until the network is loaded, so that a missing file is reported before any work.
"""

import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from functa.storage.errors import StorageError
from functa.storage.places.allowed import check_allowed
from functa.tasks.evaluation.config import FidConfig

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from functa.tasks.evaluation.generation.extractor import Extractor, Setting

OFFICIAL = "6726825d"  # begins the file's sha256, and ends its name: the convention of PyTorch's hub

FILE = f"weights-inception-2015-12-05-{OFFICIAL}.pth"

DIMENSIONS = 2048

RESIZE = "bilinear to 299x299 as in TensorFlow 1, no antialiasing"

READ_BYTES = 1 << 20

_LOADING = threading.Lock()


def weights_digest(fid: FidConfig) -> str:
    """Return the sha256 of the weights file. Raises StorageError if it is missing, or another file and not allowed."""
    sha256 = hashlib.sha256()
    try:
        with _weights_file(fid).open("rb") as file:
            while block := file.read(READ_BYTES):
                sha256.update(block)
    except (OSError, ValueError) as error:
        raise StorageError(
            f"evaluation.fid.weights {fid.weights}: cannot be read ({getattr(error, 'strerror', None) or error}); "
            f"give the local path of {FILE}, or null for no FID"
        ) from None
    digest = sha256.hexdigest()
    if not is_standard(digest) and not fid.any_weights:
        raise StorageError(
            f"evaluation.fid.weights {fid.weights}: sha256 {digest[:16]}... is not that of {FILE}, which begins with "
            f"{OFFICIAL}; give that file, or evaluation.fid.any_weights=true for a distance that is not FID"
        )
    return digest


def _weights_file(fid: FidConfig) -> Path:
    assert fid.weights is not None
    check_allowed(fid.weights)
    return Path(fid.weights).expanduser()


def is_standard(digest: str) -> bool:
    """Return whether a file of this sha256 is the one behind the literature's FID."""
    return digest.startswith(OFFICIAL)


def check_counts(fid: FidConfig, samples: int, reference: int) -> None:
    """Raise StorageError if there are too few images for FID, unless the config allows few."""
    if fid.few or min(samples, reference) >= fid.min_samples:
        return
    fix = "give evaluation.samples more" if reference >= fid.min_samples else "the set has no more training images"
    rank = f"; fewer than {DIMENSIONS + 1} leave the covariance of {DIMENSIONS} features without full rank"
    raise StorageError(
        f"evaluation.fid: {samples} samples and {reference} reference images are too few for FID, which takes "
        f"{fid.min_samples} of each{rank if min(samples, reference) <= DIMENSIONS else ''}; {fix}, "
        "or give evaluation.fid.few=true for a distance that is not called FID, or evaluation.fid.weights=null"
    )


def is_fid(fid: FidConfig, digest: str, samples: int, reference: int) -> bool:
    """Return whether a distance may be called FID: standard weights, enough images on both sides."""
    return is_standard(digest) and min(samples, reference) >= fid.min_samples


def space_of(digest: str) -> str:
    """Return the name of the feature space."""
    return "inception" if is_standard(digest) else "inception_other"


def open_extractor(setting: "Setting") -> "Extractor":
    """Open the pooled features."""
    from functa.tasks.evaluation.generation.extractor import Extractor

    fid = setting.job.evaluation.fid
    return Extractor(load_inception(fid, setting.device), DIMENSIONS, protocol={"weights": weights_digest(fid)})


def load_inception(fid: FidConfig, device: "torch.device") -> "Callable[[Tensor], Tensor]":
    """Pool features: images [B, H, W, 1 or 3] in [0, 1] -> [B, 2048] float32, on the CPU.

    torch-fidelity's port of the network and of its resize; images are rounded to bytes first, as files would hold them.
    Raises StorageError for a file that holds no such weights.
    """
    import torch

    network = _network(fid).to(device)

    def features(images: "Tensor") -> "Tensor":
        pixels = (images.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 3, 1, 2)  # [B, ch, H, W]
        pixels = pixels.expand(-1, 3, -1, -1)  # grey as three equal channels
        with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            return torch.cat([network(part.to(device))[0].cpu() for part in pixels.split(fid.batch)])

    return features


def _network(fid: FidConfig) -> Any:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    path = str(_weights_file(fid))
    try:
        with _tensors_only():
            return FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=path)
    except Exception as error:  # a file of another kind makes the library raise anything
        # Only the first sentence: torch then advises how to load the file anyway, even a hostile one.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].split(". ")[0]
        raise StorageError(
            f"evaluation.fid.weights {fid.weights}: holds no weights of Inception's form ({reason}); give {FILE}"
        ) from None


@contextmanager
def _tensors_only() -> Iterator[None]:
    """Let torch load tensors only: otherwise the library would unpickle, and so run, whatever the file holds."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    with _LOADING:
        before = os.environ.get(name)
        os.environ[name] = "1"
        try:
            yield
        finally:
            os.environ.pop(name) if before is None else os.environ.update({name: before})
