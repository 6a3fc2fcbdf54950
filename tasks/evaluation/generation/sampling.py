"""Samples for the report: spread evenly over the indices, and so over the classes; not selected."""

from typing import Any

import numpy as np
import torch

from functa.models.field.inner import decode
from functa.storage.images.source import open_images
from functa.tasks.evaluation.evaluator_input import SILENT, EvaluationJob, Messages, write_arrays
from functa.tasks.inference.sample import read_samples
from functa.tasks.inputs.pictures import as_uint8, spread
from functa.tasks.trained import load_field


def measure(job: EvaluationJob, messages: Messages = SILENT) -> dict[str, Any]:
    """Write pictures of some samples for the report; return how all were drawn."""
    drawn = job.samples
    assert drawn is not None
    count = int(drawn.slices[-1].removesuffix(".npy").rpartition("-")[2])
    shown = spread(count, min(count, job.evaluation.shown))
    z = np.concatenate([read_samples(drawn.slices, int(row), int(row) + 1) for row in shown])
    field, _, _ = load_field(job.field)
    side = open_images(job.images).resolution
    with torch.no_grad():
        images = decode(field, torch.from_numpy(z), (side, side))
    labels = np.array([-1 if drawn.labels is None else drawn.labels[row] for row in shown])
    write_arrays(job.output, "samples", samples=as_uint8(images), labels=labels)
    return {"sampling": job.sampling}
