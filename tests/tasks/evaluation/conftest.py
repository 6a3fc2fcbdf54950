"""A functaset that the evaluators of reconstructions share."""

import pytest

from functa.tasks.evaluation.evaluator_input import EvaluationJob
from tests.helpers.tasks.encoded import encoded


@pytest.fixture(scope="package")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> EvaluationJob:
    """Make a float32 functaset of 200 digits per split under a field of 20 steps."""
    folder = tmp_path_factory.mktemp("compression")
    few = ["evaluation.bits=[6,4,2]", "evaluation.compression.jpeg=[50]", "evaluation.compression.webp=[50]"]
    config, work = encoded(folder, *few)
    return EvaluationJob(
        seed=0, images=config.images, quantization=config.encode.quantization, evaluation=config.evaluation,
        calibration_images=200, functaset=work.functaset, field=work.field, output=str(folder / "run"), device="cpu",
    )  # fmt: skip
