"""Training batches: every image once per epoch, in one of its rows, the same in every process."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch

from functa.models.config import NormalizationConfig
from functa.storage.config import QuantizationConfig
from functa.storage.errors import StorageError
from functa.storage.functaset.functaset import Functaset
from functa.storage.functaset.plan import RowTable
from functa.storage.functaset.planning import plan_fragment
from functa.storage.functaset.quantizer import calibrate
from functa.storage.readers import open as opening
from functa.storage.readers.open import open_reader
from functa.storage.readers.order import Order
from functa.storage.readers.reader import Indexed
from functa.storage.readers.shards import COLUMN_BYTES
from functa.storage.readers.streamed import Streamed
from functa.tasks.inputs.batches import (
    Batches,
    FromHost,
    FromStream,
    OnDevice,
    check_labels,
    order_record,
    rows_by_image,
    training_batches,
)
from functa.tasks.inputs.latents import training_normalizer
from functa.tasks.training.ranks import Ranks
from tests.helpers.storage.functasets import FINGERPRINT, SHAPE, fill, latents_of, new_store, plan

CPU = torch.device("cpu")
IMAGES, EACH = 20, 4  # rows of an image


@pytest.fixture(scope="module")
def augmented(tmp_path_factory: pytest.TempPathFactory) -> Functaset:
    """A functaset of plain images and three augmentations each. (Their latents depend on the image only.)"""
    store = new_store(str(tmp_path_factory.mktemp("z")), FINGERPRINT | {"augmentation.count": EACH - 1})
    keys = [f"train/{i:05d}" for i in range(IMAGES) for _ in range(EACH)]
    labels = np.repeat(np.arange(IMAGES, dtype=np.int32) % 10, EACH)
    augmentations = np.tile(np.arange(EACH, dtype=np.int32), IMAGES)
    train = plan_fragment(
        store, RowTable.of(keys, labels, [f"t-{key}" for key in keys], augmentations), split="train",
        latent_shape=SHAPE, shard_rows=8, chunk_rows=4, codec="zstd",
        quantizer=calibrate(QuantizationConfig(bits=8), latents_of(keys)),
    )  # fmt: skip
    fill(store, [train.plan, plan(store, "test", n=6)])
    return Functaset.open(store)


def alone(rank: int, world: int) -> Ranks:
    """Return a rank that needs no others: all of them would find that the rows fit, or that they do not."""

    class Alone(Ranks):
        def any_of(self, flag: bool) -> bool:
            return flag

    return Alone(rank, world)


def indexed(functaset: Functaset) -> Indexed:
    reader = open_reader(functaset, "train", "memory")
    assert isinstance(reader, Indexed)
    return reader


def test_rows_are_grouped_by_image(augmented: Functaset) -> None:
    reader = indexed(augmented)
    order, starts, counts = rows_by_image(reader)
    assert counts.tolist() == [EACH] * IMAGES
    assert sorted(order.tolist()) == list(range(IMAGES * EACH))
    for start in starts:
        assert len({bytes(reader.ids[row]) for row in order[start : start + EACH]}) == 1


def batches(functaset: Functaset, size: int, steps: int, **options: object) -> Batches:
    normalizer = training_normalizer(functaset, NormalizationConfig(kind="scalar"))
    given = {"ranks": Ranks(), "steps": steps, "classes": 10, **options}
    return training_batches(functaset, normalizer, size, 7, **given)  # type: ignore[arg-type]


def test_an_epoch_uses_every_image_once_in_a_randomly_drawn_row(augmented: Functaset) -> None:
    epochs, seen = 300, []
    of_step = batches(augmented, IMAGES, epochs)
    assert isinstance(of_step, OnDevice)
    reader = indexed(augmented)
    rows = np.stack([of_step._choose(step) for step in range(epochs)])
    for chosen in rows:
        assert len({bytes(reader.ids[row]) for row in chosen}) == IMAGES
        seen += chosen.tolist()
    counts = Counter(seen)
    assert scipy.stats.chisquare([counts[row] for row in range(IMAGES * EACH)]).pvalue > 1e-3
    assert not np.array_equal(np.sort(rows[0]), np.sort(rows[1]))
    again = batches(augmented, IMAGES, epochs)
    assert torch.equal(again(5)[0], of_step(5)[0])


def test_plain_batches_contain_no_augmentations(augmented: Functaset) -> None:
    x, labels = batches(augmented, IMAGES, 1, plain=True)(0)
    assert x.shape == (IMAGES, *SHAPE)
    assert sorted(labels.tolist()) == sorted(i % 10 for i in range(IMAGES))


def test_ranks_get_their_parts_of_one_batch(augmented: Functaset) -> None:
    whole = batches(augmented, 7, 4)
    parts = [batches(augmented, 7, 4, ranks=alone(rank, 2)) for rank in range(2)]
    for step in range(4):
        for one, pieces in zip(whole(step), zip(*(part(step) for part in parts), strict=True), strict=True):
            assert torch.equal(torch.cat(pieces), one)


def test_batches_from_the_host_equal_those_kept_on_the_device(augmented: Functaset) -> None:
    reader, normalizer = indexed(augmented), training_normalizer(augmented, NormalizationConfig(kind="array"))
    choose = lambda step: np.array([3, 3, 70, step])  # noqa: E731
    resident = OnDevice(reader, normalizer, choose, slice(1, 4), CPU)  # type: ignore[arg-type]
    streamed = FromHost(reader, normalizer, choose, slice(1, 4), CPU, steps=3)
    for step in range(3):
        for one, other in zip(resident(step), streamed(step), strict=True):
            assert torch.equal(one, other)


def test_uploading_rows_of_many_steps_at_once_changes_nothing(augmented: Functaset) -> None:
    """The mode of a GPU, resumed in the middle."""
    plain, ahead = batches(augmented, 6, 40), batches(augmented, 6, 40)
    assert isinstance(ahead, OnDevice)
    ahead._uploaded = 16
    for step in (0, 1, 15, 16, 5, 39):
        assert torch.equal(ahead(step)[0], plain(step)[0])


@pytest.mark.parametrize("label", [10, -1])
def test_a_label_that_is_no_class_is_refused_before_training(label: int) -> None:
    with pytest.raises(StorageError, match=rf"it: has a row of label {label}, but there are 10 classes \(0 to 9\)"):
        check_labels("it", np.array([0, 9, label], np.int32), 10)


def test_a_functaset_with_labels_beyond_the_classes_is_refused(augmented: Functaset) -> None:
    with pytest.raises(StorageError, match=r"has a row of label 9, but there are 9 classes \(0 to 8\)"):
        batches(augmented, 4, 1, classes=9)
    assert batches(augmented, 4, 1, classes=None)(0)[0].shape[0] == 4  # unconditional: labels are not used


@pytest.fixture
def no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Report that no memory is free, so that what cannot be mapped is streamed."""
    monkeypatch.setattr(opening, "free_memory", lambda: 0)


def of_epoch(functaset: Functaset, **options: object) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return the batches of 5 of the first epoch, IMAGES / 5 of them."""
    load = batches(functaset, 5, 40, **options)
    assert isinstance(load, FromStream)
    return [load(step) for step in range(IMAGES // 5)]


@pytest.mark.usefixtures("no_memory")
def test_a_split_that_fits_nowhere_is_streamed_one_row_of_each_image_an_epoch(augmented: Functaset) -> None:
    load = batches(augmented, 5, 40)
    epochs = [[load(epoch * (IMAGES // 5) + step) for step in range(IMAGES // 5)] for epoch in range(3)]
    stored = augmented.load("train")
    normalizer = training_normalizer(augmented, NormalizationConfig(kind="scalar"))
    known = normalizer.normalize(torch.from_numpy(stored.dequantized())).flatten(1)
    for epoch in epochs:
        z, labels = torch.cat([x for x, _ in epoch]).flatten(1), torch.cat([labels for _, labels in epoch])
        nearest = torch.cdist(z, known, compute_mode="donot_use_mm_for_euclid_dist").min(1)
        assert nearest.values.max() < 1e-3
        assert stored.labels[nearest.indices.numpy()].tolist() == labels.tolist()
        images = {z.tobytes() for z in z.numpy()}  # latents depend on the image only
        assert len(images) == IMAGES // 5 * 5
    assert [x[0].tolist() for x, _ in epochs[0]] != [x[0].tolist() for x, _ in epochs[1]]


@pytest.mark.usefixtures("no_memory")
def test_a_streamed_training_continues_at_any_step_with_the_same_batches(augmented: Functaset) -> None:
    whole, steps = batches(augmented, 5, 40), 2 * (IMAGES // 5) + 3
    expected = [whole(step) for step in range(steps)]
    for begin in (0, 1, IMAGES // 5 - 1, IMAGES // 5, IMAGES // 5 + 2):
        resumed = batches(augmented, 5, 40)
        for step in range(begin, steps):
            for one, other in zip(resumed(step), expected[step], strict=True):
                assert torch.equal(one, other)


@pytest.mark.usefixtures("no_memory")
def test_ranks_stream_disjoint_rows(augmented: Functaset) -> None:
    parts = [batches(augmented, 6, 40, ranks=alone(rank, 2)) for rank in range(2)]
    seen = [z.numpy().tobytes() for part in parts for step in range(IMAGES // 6) for z in part(step)[0]]
    assert len(seen) == len(set(seen)) == IMAGES // 6 * 6


@pytest.mark.usefixtures("no_memory")
def test_what_cannot_be_streamed_is_refused_before_training(augmented: Functaset) -> None:
    with pytest.raises(StorageError, match=r"batch 5 is no multiple of dispatch\.devices=2"):
        batches(augmented, 5, 40, ranks=alone(0, 2))
    with pytest.raises(StorageError, match=rf"has {IMAGES} images, less than a batch of {IMAGES + 1}: lower it"):
        batches(augmented, IMAGES + 1, 40)
    with pytest.raises(StorageError, match="there are 5 classes"):
        for x, _ in of_epoch(augmented, classes=5):
            assert len(x)


def test_the_memory_of_a_machine_is_shared_by_its_processes(
    augmented: Functaset, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = IMAGES * EACH * (int(np.prod(SHAPE)) + COLUMN_BYTES)
    monkeypatch.setattr(opening, "free_memory", lambda: int(2 * rows / opening.MEMORY_SHARE) + 1)
    assert isinstance(batches(augmented, 6, 4, ranks=alone(0, 2)), OnDevice)
    assert isinstance(batches(augmented, 6, 4, ranks=alone(0, 3)), FromStream)
    assert isinstance(batches(augmented, 6, 4, ranks=replace(alone(0, 6), nodes=3)), OnDevice)


@pytest.mark.usefixtures("no_memory")
@pytest.mark.faults
def test_a_training_that_began_streamed_is_streamed_however_much_memory_is_free(
    augmented: Functaset, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    began = batches(augmented, 6, 40)
    record = order_record(began, Ranks())
    expected = [began(step) for step in range(5)]
    monkeypatch.undo()
    assert order_record(batches(augmented, 6, 40), Ranks()) == {}
    continued = batches(augmented, 6, 40, begun=record)
    for step in range(5):
        for one, other in zip(continued(step), expected[step], strict=True):
            assert torch.equal(one, other)
    batches(augmented, 6, 40, begun=record, ranks=alone(0, 2))
    assert "was streamed to 1 processes, now to 2" in caplog.text


@pytest.mark.usefixtures("no_memory")
def test_what_does_not_fit_is_copied_to_the_disk_of_the_machine_and_mapped_where_asked_for(
    augmented: Functaset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FUNCTA_HYDRATED", str(tmp_path))
    streamed = order_record(batches(augmented, 6, 40), Ranks())
    mapped = batches(augmented, 6, 40, hydrates=True)
    assert isinstance(mapped, FromHost)
    assert isinstance(batches(augmented, 6, 40, hydrates=True, begun=streamed), FromStream)
    monkeypatch.setattr(opening, "free_memory", lambda: 1 << 40)
    resident = batches(augmented, 6, 40)
    for step in range(5):
        for one, other in zip(mapped(step), resident(step), strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.usefixtures("no_memory")
@pytest.mark.faults
def test_a_training_that_began_in_memory_does_not_continue_in_another_order(augmented: Functaset) -> None:
    with pytest.raises(StorageError, match="does not fit into memory now, but did when its training began"):
        batches(augmented, 5, 40, begun={"digest": "d"})


def test_of_a_streamed_image_another_row_is_drawn_in_every_epoch(augmented: Functaset) -> None:
    reader = open_reader(augmented, "train", "streamed")
    assert isinstance(reader, Streamed)
    drawn = reader.for_training(5, one_each=True)
    assert (len(reader), len(drawn)) == (IMAGES * EACH, IMAGES)
    for number in range(len(drawn._counts)):
        rows = [drawn._wanted(number, Order(5), epoch) for epoch in range(40)]
        chosen = np.stack(rows) - rows[0] // EACH * EACH  # this fixture's shards hold whole images
        assert (chosen >= 0).all()
        assert (chosen < EACH).all()
        assert all(len(np.unique(column)) == EACH for column in chosen.T)
