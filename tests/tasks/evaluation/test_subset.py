"""Latents of some images beside the images."""

import numpy as np

from functa.tasks.evaluation.evaluator_input import EvaluationJob, open_bench
from functa.tasks.evaluation.subset import stored_subset


def test_stored_latents_are_those_of_their_images(evaluated: EvaluationJob) -> None:
    """This holds for a subset too, which is in the order of the store."""
    bench = open_bench(evaluated)
    for split, count in (("train", 50), ("test", 10_000)):
        subset = stored_subset(bench, split, count)
        assert len(subset) == len(set(subset.rows.tolist())) and abs(len(subset) - min(count, 200)) < 8
        encoded = bench.loop.encode(subset.pixels(np.arange(len(subset))))
        np.testing.assert_allclose(subset.z, encoded, rtol=1e-3, atol=1e-5)
