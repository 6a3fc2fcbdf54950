"""Samples against training images: slices that merge, duplicates, sizes, ranks, and FID from a file of weights."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from functa.flows.config.load import load_config
from functa.models.measures.metrics import FrechetStatistics, frechet_distance
from functa.storage.errors import StorageError
from functa.storage.functaset.functaset import Functaset
from functa.storage.functaset.shards.shard import Shard
from functa.storage.images.source import open_images
from functa.storage.places import local
from functa.tasks.evaluation.catalogue import BY_SPACE
from functa.tasks.evaluation.evaluator_input import Messages
from functa.tasks.evaluation.generation import features as computing
from functa.tasks.evaluation.generation import inception
from functa.tasks.evaluation.generation.distances import check_sets, delete_features, measure, no_distance
from functa.tasks.evaluation.generation.extractor import Extractor
from functa.tasks.evaluation.generation.feature_inputs import write_inputs
from functa.tasks.evaluation.generation.feature_sets import Gathered, Space, from_bytes, merged, to_bytes
from functa.tasks.inference.sample import read_samples
from functa.tasks.inputs.latents import PlainRows, load_split
from tests.helpers.tasks.changing_source import write_image
from tests.helpers.tasks.evaluated import COUNT, evaluation_job, features, samples, with_samples, write_samples

LABELS = [n % 10 for n in range(COUNT)]
SMALL = ["features_slice=5", "shown=4"]


def gathered(x: np.ndarray, name: str = "a", kind: str = "samples", kept: int = 4) -> Gathered:
    space = Space(x.shape[1], FrechetStatistics())
    space.add(len(x), torch.from_numpy(x), np.arange(len(x)) < kept, np.arange(len(x)) % 3)
    pictures = [np.frombuffer(x[:, :4].astype(np.float64).tobytes(), np.uint8).reshape(len(x), 32)]
    return Gathered(kind, {name: space}, shape=(8, 8, 1), pictures=pictures)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cuts=st.lists(st.integers(1, 59), unique=True, max_size=8), shift=st.floats(-100, 100))
def test_slices_of_any_size_merge_to_one_pass(tmp_path: Path, cuts: list[int], shift: float) -> None:
    x = np.random.default_rng(1).normal(shift, 1, (60, 5))
    whole = gathered(x)
    uris = []
    for number, part in enumerate(np.split(x, sorted(cuts))):
        (tmp_path / f"{number}.npz").write_bytes(to_bytes(gathered(part)))
        uris.append(f"{tmp_path}/{number}.npz")
    found = merged(uris)["samples"]
    ours, theirs = found.spaces["a"], whole.spaces["a"]
    assert ours.moments is not None and theirs.moments is not None and ours.count == 60
    for got, known in zip(ours.moments.moments(), theirs.moments.moments(), strict=True):
        torch.testing.assert_close(got, known, rtol=1e-9, atol=1e-9)
    assert found.duplicates == whole.duplicates == 0 and found.shape == (8, 8, 1)


def test_features_are_read_bit_for_bit_as_they_were_written() -> None:
    known = gathered(np.random.default_rng(0).normal(size=(9, 6)).astype(np.float32))
    known.spaces["a"].protocol = {"weights": "ab" * 32}
    back = from_bytes(to_bytes(known))
    assert to_bytes(back) == to_bytes(known)
    assert (back.spaces["a"].protocol, back.kind) == ({"weights": "ab" * 32}, "samples")
    assert np.concatenate(back.spaces["a"].labels).tolist() == [0, 1, 2, 0]
    torch.testing.assert_close(torch.cat(back.spaces["a"].kept), torch.cat(known.spaces["a"].kept), rtol=0, atol=0)
    assert back.spaces["a"].moments is not None and back.spaces["a"].moments.total is not None
    assert back.spaces["a"].moments.total.dtype == torch.float64


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("evaluated")


def figures_of(folder: Path, run: str, *settings: str, z: np.ndarray | None = None, parts: int = 1) -> dict[str, Any]:
    job = evaluation_job(folder, *SMALL, *settings).model_copy(update={"output": str(folder / run / "run")})
    slices = write_samples(folder / run, samples() if z is None else z)
    warnings: list[str] = []
    found = measure(
        with_samples(job, slices, LABELS, features(job, slices, parts, LABELS)), Messages(warn=warnings.append)
    )
    return found | {"warnings": warnings}


def test_figures_do_not_depend_on_the_number_of_slices(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, cut = figures_of(folder, "whole"), figures_of(folder, "cut", parts=2)
    for key in BY_SPACE:
        assert whole[key] == pytest.approx(cut[key], rel=1e-5, abs=1e-9), key
    dimensions = {"classifier": 12, "latent": 32, "wavelet": 16}
    assert whole["fd_reference"] == {
        "images": "train", "count": 40, "samples": COUNT, "dimensions": dimensions, "test": COUNT,
        "subset": dict.fromkeys(dimensions, COUNT),
    }  # fmt: skip
    assert whole["fd_protocol"] == {"wavelet": {"wavelet": "Haar", "level": 1}}
    assert set(whole["fd"]) == set(whole["fd_test"]) == set(whole["fd_noise"]) == {"classifier", "wavelet"}
    assert whole["fd_noise"]["wavelet"] > whole["fd_test"]["wavelet"]
    assert set(whole["label_agreement"]) == set(whole["probe_top1"]) == set(dimensions)
    assert whole["duplicates"] == cut["duplicates"] == 0
    output = folder / "cut" / "run"
    assert len(list((output / "features").glob("*.npz"))) == 10  # for as long as anything may have to be measured again
    with monkeypatch.context() as patch:
        patch.setattr(computing, "gather", lambda *_: pytest.fail("features were computed again"))
        again = figures_of(folder, "cut", parts=2)
    assert again == cut
    delete_features(str(output))
    assert [path.name for path in (output / "features").iterdir()] == ["normalizer.json"]


def test_slices_list_no_images_and_read_only_the_receipts_of_their_rows(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many slices there are."""
    pictures = folder / "pictures"
    for i in range(40):
        write_image(pictures, f"{'train' if i < 36 else 'test'}/{'ab'[i % 2]}/{i:03d}.png", i)
    of_files = ["images.source=folder", f"images.location={pictures}", "images.channels=1"]
    images = load_config("digits", of_files).images
    job = evaluation_job(folder).model_copy(update={"images": images})
    functaset, read = Functaset.open(job.functaset), list[object]()
    shards = len(functaset.shards("train")) + len(functaset.shards("test"))
    checked = Shard._checked
    monkeypatch.setattr(Shard, "_checked", lambda shard, data: read.append(shard.number) or checked(shard, data))
    for parts in (1, 6, 12):
        own = job.model_copy(update={"output": str(folder / f"counted-{parts}" / "run")})
        slices = write_samples(folder / f"counted-{parts}", samples())
        sets = {"reference": (36, parts), "test": (4, parts)}
        write_inputs(own.output, open_images(images), own.functaset, sets)
        read.clear()
        with monkeypatch.context() as patch:
            patch.setattr(local.LocalLocation, "listing", None)
            for part in range(parts):
                for kind in computing.KINDS:
                    labels = tuple(LABELS[row] for row in computing.part_of(COUNT, part, parts))
                    computing.write_features(computing.FeatureJob(
                        evaluation=own, kind=kind, part=part, parts=parts, count=COUNT,
                        images=sets[kind][0] if kind in sets else 0, slices=tuple(slices), labels=labels,
                    ))  # fmt: skip
        assert len(read) <= shards


def test_without_a_pixel_classifier_the_latents_alone_are_compared(folder: Path) -> None:
    """Images of one class only cannot train it."""
    job = evaluation_job(folder, *SMALL).model_copy(
        update={"output": str(folder / "unjudged" / "run"), "pixel_classifier": "", "spaces": ("latent",)}
    )
    slices = write_samples(folder / "unjudged", samples())
    found = measure(with_samples(job, slices, LABELS, features(job, slices, 2, LABELS)))
    whole = figures_of(folder, "judged")
    assert set(found["kd"]) == set(found["label_agreement"]) == {"latent"}
    assert found["kd"]["latent"] == pytest.approx(whole["kd"]["latent"], rel=1e-5)
    assert found["fd_reference"]["dimensions"] == {"latent": 32}


def test_the_distances_are_those_of_all_features_at_once(folder: Path) -> None:
    """Reference and samples are compared with features computed here without slices."""
    job = evaluation_job(folder).model_copy(update={"output": str(folder / "direct" / "run")})
    slices = write_samples(folder / "direct", samples())
    sets = merged(features(job, slices, parts=2))
    tools = computing.open_tools(computing.FeatureJob(evaluation=job, kind="samples", part=0, parts=1, count=COUNT))
    split = open_images(job.images).split("train")
    pixels = torch.from_numpy(split.read(np.arange(len(split))).images).float() / 255
    decoded = computing._decoded(tools, np.arange(COUNT), COUNT, torch.from_numpy(samples())).images
    assert decoded is not None
    with torch.no_grad():
        known = [FrechetStatistics().update(tools.extractors["classifier"].compute(x)) for x in (decoded, pixels)]
    ours = [sets[kind].spaces["classifier"].moments for kind in ("samples", "reference")]
    assert ours[0] is not None and ours[1] is not None
    assert frechet_distance(ours[0], ours[1]) == pytest.approx(frechet_distance(*known), rel=1e-9)
    z = load_split(Functaset.open(job.functaset), "train").z
    rows, _ = sets["reference"].spaces["latent"].rows(COUNT)
    torch.testing.assert_close(rows, tools.normalizer.normalize(z).flatten(1))


def test_without_a_frechet_distance_only_rows_that_are_compared_one_by_one_are_computed(folder: Path) -> None:
    """A network's features cost much: 20 samples have no covariance of 1,280 dimensions."""
    job = evaluation_job(folder, "subset=9").model_copy(update={"output": str(folder / "rows" / "run")})
    slices, seen = write_samples(folder / "rows", samples()), list[int]()
    features(job, slices)
    sizes = computing.set_sizes(open_images(job.images), COUNT)

    def compute(images: torch.Tensor) -> torch.Tensor:
        seen.append(len(images))
        return torch.zeros(len(images), 1280)

    counts = {}
    for kind, rows in sizes.items():
        part = computing.FeatureJob(
            evaluation=job, kind=kind, part=0, parts=1, count=COUNT, images=rows, slices=tuple(slices)
        )
        tools = replace(computing.open_tools(part), extractors={"wide": Extractor(compute, 1280)})
        counts[kind] = {
            name: (space.count, space.kept_rows) for name, space in computing.gather(part, tools).spaces.items()
        }
    compared = {"reference": {"wide": (40, 9)}, "samples": {"wide": (COUNT, 9)}, "test": {"wide": (COUNT, 9)}}
    assert counts == compared | {"reconstruction": {}, "noise": {}}
    assert seen == [9, 9, 9]


def test_rows_read_shard_by_shard_equal_those_read_at_once(folder: Path) -> None:
    functaset = Functaset.open(evaluation_job(folder).functaset)
    rows, whole = PlainRows(functaset, "train"), load_split(functaset, "train").z
    assert len(rows) == COUNT
    for wanted in (np.arange(COUNT), np.array([0, 7, 8, 19]), np.array([9]), np.array([], np.int64)):
        torch.testing.assert_close(rows.read(wanted), whole[wanted], rtol=0, atol=0)


def test_samples_are_read_from_the_files_that_hold_them(tmp_path: Path) -> None:
    z = samples()
    uris = write_samples(tmp_path, z)
    for start, stop in ((0, 20), (6, 8), (7, 14), (19, 20)):
        np.testing.assert_array_equal(read_samples(uris, start, stop), z[start:stop])
    Path(uris[0]).unlink()
    np.testing.assert_array_equal(read_samples(uris, 8, 20), z[8:])


def test_too_few_samples_for_a_distance_are_reported_with_their_numbers(folder: Path) -> None:
    found = figures_of(folder, "few")
    assert "latent" not in found["fd"] and "classifier" in found["fd"]
    assert {"latent", "classifier", "wavelet"} == set(found["kd"]) == set(found["precision"])
    (warning,) = found["warnings"]
    assert "space 'latent': it has 32 dimensions" in warning
    assert warning.endswith("there are 20 and 20")


def test_duplicates_are_counted_and_too_many_refused(folder: Path) -> None:
    z = samples()
    z[[4, 11]], z[13] = z[0], z[1]
    found = figures_of(folder, "some", z=z)
    assert found["duplicates"] == 3
    assert any("3 of 20 samples repeat another one" in text for text in found["warnings"])
    z[:] = z[:1]
    with pytest.raises(StorageError, match=r"^19 of 20 samples repeat .* evaluation.allow_duplicates=true$"):
        figures_of(folder, "same", z=z)
    assert figures_of(folder, "allowed", "allow_duplicates=true", z=z)["duplicates"] == 19


def test_pictures_of_other_sizes_are_refused(folder: Path) -> None:
    x = np.random.default_rng(0).normal(size=(9, 6))
    sets = {kind: gathered(x, "classifier", kind) for kind in ("samples", "reference")}
    evaluation = evaluation_job(folder).evaluation
    check_sets(sets, evaluation, pytest.fail)
    sets["samples"].shape = (16, 16, 1)
    with pytest.raises(StorageError, match="samples of 16x16x1 cannot be compared with reference images of 8x8x1"):
        check_sets(sets, evaluation, pytest.fail)
    with pytest.raises(StorageError, match=r"a slice of picture shape \(8, 8, 1\) beside one of \(16, 16, 1\)"):
        sets["samples"].merge(gathered(x))
    with pytest.raises(StorageError, match="latents of shape"):
        figures_of(folder, "wide", z=np.zeros((COUNT, 2, 2, 9), np.float32))


# FID


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Write random weights of the right shapes: those of the library's own network."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "load", lambda *_, **__: {})
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, _: None)
        network = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path="none")
    torch.save(network.state_dict(), path)
    return str(path)


@pytest.mark.slow
def test_few_images_and_other_weights_give_a_distance_that_is_not_called_fid(folder: Path, weights: str) -> None:
    z = samples(5)
    job = evaluation_job(folder, *SMALL, f"fid.weights={weights}", "fid.any_weights=true", "fid.few=true")
    job = job.model_copy(update={"output": str(folder / "fid" / "run"), "images": job.images.model_copy(
        update={"limit": 6})})  # fmt: skip
    slices, warnings = write_samples(folder / "fid", z), list[str]()
    found = measure(with_samples(job, slices, None, features(job, slices, count=5)), Messages(warn=warnings.append))
    assert "fid" not in found and "fid_protocol" not in found
    for key in ("fd", "fd_reconstruction"):
        assert found[key]["inception_other"] > 0
    assert "inception_other" not in found["fd_noise"]
    protocol = found["inception_protocol"]
    assert protocol["weights"] == inception.weights_digest(job.evaluation.fid)
    assert protocol["counts"] == {"samples": 5, "reconstruction": 5, "reference": 6}
    assert "no antialiasing" in protocol["resize"] and {"torch", "torch-fidelity"} == set(protocol["versions"])
    assert any("5 samples leave the covariance of 2048 features without full rank" in text for text in warnings)
    json.dumps(found)


def test_standard_weights_and_enough_images_are_called_fid(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the naming is tested: the features of the network are replaced."""
    from functa.tasks.evaluation.generation.distances import named

    fid = evaluation_job(folder, "fid.weights=w", "fid.min_samples=2049")
    standard = inception.OFFICIAL + "0" * 56
    for count, called in ((2049, True), (2048, False)):
        space = Space(2048, None, count, protocol={"weights": standard})
        sets = {kind: Gathered(kind, {"inception": space})
                for kind in ("samples", "reconstruction", "reference")}  # fmt: skip
        given = {"fd": {"inception": 3.0}, "fd_reconstruction": {"inception": 1.0}}
        found = named(given, sets, fid)
        assert ("fid" in found) == ("fid_protocol" in found) == called
        assert ("inception" in found["fd"]) == ("inception_protocol" in found) == (not called)
        if called:
            assert (found["fid"], found["fid_reconstruction"]) == (3.0, 1.0)


def test_features_equal_those_of_torchmetrics_without_antialiasing(weights: str) -> None:
    from torchmetrics.image.fid import NoTrainInceptionV3

    from functa.tasks.evaluation.config import FidConfig

    images = torch.rand(2, 12, 12, 3)
    load = inception.load_inception(FidConfig(weights=weights, any_weights=True, batch=1), torch.device("cpu"))
    peer = NoTrainInceptionV3("inception", ["2048"], feature_extractor_weights_path=weights, antialias=False)
    pixels = (images * 255).round().to(torch.uint8).permute(0, 3, 1, 2)
    torch.testing.assert_close(load(images), peer(pixels), rtol=1e-4, atol=1e-5)
    assert (load(images[:1, ..., :1]) - load(images[:1, ..., :1].expand(-1, -1, -1, 3))).abs().max() == 0  # grey


def test_weights_of_another_digest_are_refused_unless_allowed(weights: str, folder: Path) -> None:
    fid = evaluation_job(folder, f"fid.weights={weights}").evaluation.fid
    with pytest.raises(StorageError, match=r"is not that of weights-inception.*any_weights=true") as caught:
        inception.weights_digest(fid)
    assert "\n" not in str(caught.value) and weights in str(caught.value)
    assert len(inception.weights_digest(fid.model_copy(update={"any_weights": True}))) == 64


def test_a_missing_file_is_named(tmp_path: Path, folder: Path) -> None:
    for path in (tmp_path / "none.pth", tmp_path):
        with pytest.raises(StorageError, match=r"cannot be read .* or null for no FID"):
            inception.weights_digest(evaluation_job(folder, f"fid.weights={path}").evaluation.fid)


@pytest.mark.parametrize(
    ("samples", "reference", "expected"),
    [
        (
            50_000,
            9_999,
            "and 9999 reference images are too few for FID, which takes 10000 of each; the set has no more",
        ),
        (
            9_999,
            50_000,
            "9999 samples and 50000 reference images are too few for .* give evaluation.samples more, or give",
        ),
        (100, 500, "100 samples and 500 reference images .* the set has no more training images, or give"),
        (2_048, 50_000, "fewer than 2049 leave the covariance of 2048 features without full rank"),
    ],
)
def test_too_few_images_are_refused_unless_the_config_allows_them(
    samples: int, reference: int, expected: str, folder: Path
) -> None:
    fid = evaluation_job(folder, "fid.weights=w").evaluation.fid
    with pytest.raises(StorageError, match=expected):
        inception.check_counts(fid, samples, reference)
    inception.check_counts(fid.model_copy(update={"few": True}), samples, reference)
    inception.check_counts(fid, 10_000, 10_000)


@pytest.mark.attacks
def test_a_hostile_weights_file_runs_nothing_and_is_reported_in_one_line(tmp_path: Path, folder: Path) -> None:
    """The library would unpickle the file, which runs the code in it."""
    import pickle

    class Hostile:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return Path.touch, (Path(tmp_path / "ran"),)  # type: ignore[return-value]

    pickled, other, text = tmp_path / "pickle.pth", tmp_path / "other.pth", tmp_path / "text.pth"
    pickled.write_bytes(pickle.dumps(Hostile()))
    torch.save({"w": torch.zeros(3)}, other)
    torch.save(Hostile(), tmp_path / "zipped.pth")
    text.write_text("not weights")
    for path in (pickled, tmp_path / "zipped.pth", other, text):
        fid = evaluation_job(folder, f"fid.weights={path}", "fid.any_weights=true").evaluation.fid
        with pytest.raises(StorageError, match="holds no weights of Inception's form") as caught:
            inception.load_inception(fid, torch.device("cpu"))
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


def test_more_samples_are_advised_only_where_the_training_set_has_more_images() -> None:
    few = no_distance("latent", samples=54, dimensions=1024, images=54)
    assert "has 1,024 dimensions, and needs more training images and samples than that; there are 54 and 54" in few
    assert "evaluation.samples" not in few
    enough = no_distance("latent", samples=54, dimensions=1024, images=2000)
    assert "set evaluation.samples above 1024, up to the 2000 training images" in enough
