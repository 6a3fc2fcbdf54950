"""A model is trained on the functaset's newest commit; a resumed training keeps its own."""

import json
from pathlib import Path

import pytest
from PIL import Image

from functa.flows.config.load import load_config
from functa.flows.jobs import classifier_job, draw_jobs, pixel_classifier_job, sample_jobs
from functa.flows.ledger import Ledger
from functa.storage.functaset.functaset import Functaset
from functa.storage.functaset.header import read_root
from functa.storage.places.address import open_location
from functa.storage.places.location import Location
from functa.storage.runs.checkpoints import newest_metadata
from functa.storage.upkeep.gc import collect
from functa.tasks.evaluation.evaluator_input import EvaluationJob
from functa.tasks.training.classifier import run
from functa.tasks.training_jobs import ClassifierJob
from tests.helpers.flows.finished_stages import finish, ledger
from tests.helpers.flows.tiny_config import TINY
from tests.helpers.storage.functasets import fill, filled, plan


@pytest.fixture
def book(tmp_path: Path) -> Ledger:
    """The ledger of a root with a finished field and functaset; the functaset has one commit."""
    book = Ledger(load_config("digits", TINY), str(tmp_path / "root"))
    finish(book, "meta_train")
    with book.working("encode") as record:
        functaset = filled(book.output(record))
        fingerprint = read_root(functaset).fingerprint_digest
        book.finish(record, Functaset.open(functaset).content, {"choices": fingerprint, "info": {"version": 1}})
    return book


@pytest.fixture
def functaset(book: Ledger) -> Location:
    """The functaset of that root."""
    return open_location(book.output(book.require("encode")))


def add(functaset: Location, book: Ledger, n: int) -> None:
    """Add a commit with n rows, and record it."""
    fill(functaset, [plan(functaset, first=1000 * n, n=n)])
    with book.working("encode") as record:
        newest = Functaset.open(functaset)
        figures = record.figures | {"info": {"version": newest.version}}
        book.finish(record, newest.content, figures)


def interrupt(job: ClassifierJob, at: int) -> None:
    """Train for that many steps, and leave a checkpoint of an interrupted run."""
    short = job.classifier.model_copy(update={"steps": at})
    run(job.model_copy(update={"classifier": short}), lambda row: None)
    place = Path(job.output)
    for marker in place.glob("step-*.json"):
        document = json.loads(marker.read_text())
        document["metadata"]["finished"] = False
        marker.write_text(json.dumps(document))


def test_a_resumed_training_stays_with_the_commit_it_began_with(book: Ledger, functaset: Location) -> None:
    with book.working("train_classifier") as record:
        first = classifier_job(book, record)
        assert first.version == 1
        interrupt(first, 10)
    add(functaset, book, 7)
    with book.working("train_classifier") as record:
        again = classifier_job(book, record)
        assert (again.version, again.digest) == (1, first.digest)
        figures = run(again, lambda row: None)
        assert figures["commit"] == 1
        book.finish(record, figures.pop("weights_digest"), figures)
    metadata = newest_metadata(open_location(first.output))
    assert metadata is not None
    assert metadata["functaset"] == {"fingerprint": Functaset.open(functaset).fingerprint, "version": 1}
    classifier = book.up_to_date("train_classifier")
    assert classifier is not None
    assert "trained on commit 1 of the functaset, which has 2" in book.newer_commit_note(classifier)


def test_a_training_whose_commit_has_expired_starts_anew_on_the_newest(book: Ledger, functaset: Location) -> None:
    with book.working("train_classifier") as record:
        first = classifier_job(book, record)
        interrupt(first, 10)
    add(functaset, book, 7)
    collect(functaset, delete=True, keep_versions=1)
    with book.working("train_classifier") as record:
        again = classifier_job(book, record)
    newest = Functaset.open(functaset).version
    assert again.version == newest
    assert again.digest != first.digest


def test_a_new_training_takes_the_newest_commit(book: Ledger, functaset: Location) -> None:
    add(functaset, book, 7)
    with book.working("train_classifier") as record:
        assert classifier_job(book, record).version == 2


def test_a_root_without_a_model_has_no_note_of_a_newer_commit(tmp_path: Path) -> None:
    book = ledger(tmp_path)
    finish(book, "meta_train")
    finish(book, "encode")
    record = book.up_to_date("encode")
    assert record is not None
    assert book.newer_commit_note(record) == ""


def test_draws_for_distinct_counts_are_as_many_of_each_class(tmp_path: Path) -> None:
    """Beside the samples for distances, not among them; none if not requested, or if the model knows no classes."""
    job = EvaluationJob.model_construct(output="run", diffusion="d")

    def book(*overrides: str) -> Ledger:
        return Ledger(load_config("digits", [*TINY, "evaluation.slice=16", *overrides]), str(tmp_path))

    asked = "evaluation.memorization.draws_per_class=5"
    slices, labels = draw_jobs(book(asked), job)
    assert labels == [label for label in range(10) for _ in range(5)]
    assert [part.count for part in slices] == [16, 16, 16, 2]
    assert [label for part in slices for label in part.labels or ()] == labels
    folders = [
        {part.output for part in made} for made in (slices, sample_jobs(book(asked), job, pictures_only=False)[0])
    ]
    assert folders == [{"run/draws"}, {"run/samples"}]
    assert draw_jobs(book(), job) == draw_jobs(book("evaluation.memorization=null"), job) == ([], [])
    assert draw_jobs(book(asked, "diffusion.process.conditional=false", "diffusion.process.guidance=1"), job)[0] == []


def test_at_guidance_zero_nothing_is_of_a_class(tmp_path: Path) -> None:
    """Samples are unconditional there: labels would have no meaning."""

    def book(guidance: float) -> Ledger:
        settings = [*TINY, f"diffusion.process.guidance={guidance}", "evaluation.memorization.draws_per_class=5"]
        return Ledger(load_config("digits", settings), str(tmp_path / "root"))

    job = EvaluationJob.model_construct(output="run", diffusion="there")
    slices, labels = sample_jobs(book(0), job, pictures_only=False)
    assert labels is None
    assert {part.labels for part in slices} == {None}
    assert draw_jobs(book(0), job) == ([], [])
    assert sample_jobs(book(2), job, pictures_only=False)[1] is not None
    assert draw_jobs(book(2), job)[0]


def test_the_pixel_classifier_is_another_one_when_its_images_are(tmp_path: Path) -> None:
    """Its digest depends on the current images, its seed and its keys, and not on the machine."""
    folder = tmp_path / "images"

    def draw(*classes: str) -> None:
        for split, count in (("train", 3), ("test", 2)):
            for name in classes:
                (folder / split / name).mkdir(parents=True, exist_ok=True)
                for number in range(count):
                    Image.new("L", (8, 8), number).save(folder / split / name / f"{number}.png")

    def digest(*settings: str) -> str:
        images = [f"images.location={folder}", "images.source=folder", "images.limit=null", "images.resolution=8"]
        book = Ledger(load_config("digits", [*TINY, *images, *settings]), str(tmp_path / "root"))
        return str(pixel_classifier_job(book, "there").digest)

    draw("a", "b")
    before = digest()
    assert digest("seed=5") == digest("training_seed=5") == before
    assert digest("evaluation.pixel_classifier.log_every=7", "images.max_bad_fraction=0.5") == before
    changed = {digest("evaluation.pixel_classifier.seed=1"), digest("evaluation.pixel_classifier.width=16")}
    draw("a", "b", "c")
    changed.add(digest())
    (folder / "train" / "c" / "0.png").unlink()
    changed.add(digest())
    assert len(changed | {before}) == 5
