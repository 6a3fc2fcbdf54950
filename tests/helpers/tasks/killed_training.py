"""Run a training that kills its process before the k-th durable write: python -m ... KIND JOB.json K."""

import sys
from pathlib import Path

from functa.tasks.training import classifier, diffusion
from functa.tasks.training_jobs import ClassifierJob, DiffusionJob
from tests.helpers.storage.killed_writer import kill_before

if __name__ == "__main__":
    kind, described, k = sys.argv[1], Path(sys.argv[2]).read_text(), int(sys.argv[3])
    kill_before(k)
    if kind == "classifier":
        classifier.run(ClassifierJob.model_validate_json(described), lambda row: None)
    else:
        diffusion.run(DiffusionJob.model_validate_json(described), lambda row: None)
