"""Write a trained root's field as the two files of a ready-made one, with its card."""

from typing import Any

import numpy as np
import torch

from functa.models.compute.device import choose_device
from functa.models.measures.metrics import image_errors, psnr_of_errors
from functa.storage.config import ImagesConfig
from functa.storage.errors import StorageError
from functa.storage.images.source import open_images
from functa.storage.places.address import open_location
from functa.storage.runs.stage_records import read_record
from functa.tasks.inference.ready.field import ReadyField, ready_field
from functa.tasks.inference.ready.shipped import ReadyRecord, write_pair
from functa.tasks.inputs.given import floats
from functa.tasks.inputs.pictures import spread
from functa.tasks.stage_output import stage_output
from functa.tasks.trained import load_field

MEASURED = 64  # test images

MOST_LOST = 0.01  # dB; a field that loses more by float16 keeps float32


def pack(root: str, name: str, out: str, card: dict[str, Any]) -> ReadyRecord:
    """Write NAME.safetensors and NAME.json into a folder from the field that a root trained; return the record.

    Matrices are rounded to float16, the few other numbers stay float32; so do matrices where rounding them costs more
    than MOST_LOST dB. The inner loop computes in float32 from then on. `card` has data, command, limits, licence
    and further figures; the PSNR of test images and what float16 costs are measured here. Raises StorageError.
    """
    record = read_record(open_location(root), "meta_train")
    if record is None:
        raise StorageError(f"{root}: no field was trained there; run functa meta-train first")
    uri = stage_output(open_location(root), "meta_train").uri
    module, inner, about = load_field(uri)
    whole = ready_field(name, module, inner.model_copy(update={"precision": "float32", "compile": "auto"}),
                        about["resolution"], "")  # fmt: skip
    images = _test_images(ImagesConfig.model_validate(record.pipeline["images"]))
    tensors = {key: value.numpy().copy() for key, value in whole.module.state_dict().items()}
    rounded = {
        key: value.astype(np.float16) if value.ndim == 2 and key != "rates" else value for key, value in tensors.items()
    }
    exact, half = _psnr(whole, tensors, images), _psnr(whole, rounded, images)
    kept = tensors if exact - half > MOST_LOST else rounded
    training, seconds = record.pipeline["meta_train"], about.get("seconds", 0.0)
    took = f"{training['steps']} steps of {training['batch']} of {about['images']} images, {seconds:.0f} s"
    described = {
        "name": name,
        "field": whole.module.config.model_dump(mode="json"),
        "inner": whole.inner.model_dump(mode="json"),
        "image_channels": whole.image_channels,
        "patch": whole.patch,
        "card": {
            "training": took,
            **card,
            "figures": {
                f"dB, PSNR of {len(images)} test images": round(exact if kept is tensors else half, 2),
                "dB lost by float16": round(exact - half, 4),
                **card.get("figures", {}),
            },
        },
    }
    return write_pair(open_location(out), kept, described)


def _test_images(config: ImagesConfig) -> torch.Tensor:
    split = open_images(config).split("test")
    batch = split.read(spread(len(split), MEASURED))
    return torch.from_numpy(batch.images[batch.good])


def _psnr(field: ReadyField, tensors: dict[str, np.ndarray], images: torch.Tensor) -> float:
    """Return the mean PSNR of images encoded by the field with these tensors, in dB."""
    field.module.load_state_dict({key: torch.from_numpy(value.astype(np.float32)) for key, value in tensors.items()})
    coder, errors = field.coder(str(choose_device("auto"))), []
    for part in images.split(8):
        decoded = coder.decode(coder.encode(part), (part.shape[1], part.shape[2]))
        errors.append(image_errors(decoded, floats(part)))
    return psnr_of_errors(torch.cat(errors)).mean().item()
