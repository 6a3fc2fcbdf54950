"""Rates, cores, samples and requests that feed a run, by their closed forms."""

import pytest

from functa.flows.cli.show import describe_run, print_run
from functa.flows.config import demand
from functa.flows.config.estimate import model_costs
from functa.flows.config.load import load_config
from functa.models.field.cost import forward_flops
from tests.helpers.storage.functasets import fill, new_store, plan
from tests.helpers.storage.image_files import class_folders


def test_a_device_of_so_many_flops_needs_its_flops_over_those_of_an_image() -> None:
    config = load_config("digits", ["images.source=folder", "images.location=nowhere"])
    passes = 2 * (config.inner.steps - 1) + 1
    image = passes * forward_flops(config.field, (8, 8), 1)
    need = demand.feed(config, 8, 1, {}, {"encode": 1e12})
    assert set(need) == {"encode"}
    assert need["encode"]["images_per_s"] == pytest.approx(1e12 / image)
    each = demand.DECODE_IMAGE + 64 * demand.DECODE_PIXEL
    assert need["encode"]["cores"] == pytest.approx(1e12 / image * each)
    arrays = load_config("digits", ["encode.augmentation.count=0"])
    cores = demand.feed(arrays, 8, 1, {}, {"encode": 1e12})["encode"]["cores"]
    assert cores == pytest.approx(1e12 / image * 64 * demand.ARRAY_PIXEL)
    augmented = load_config("digits", ["encode.augmentation.count=1"])
    assert demand.feed(augmented, 8, 1, {}, {"encode": 1e12})["encode"]["cores"] == pytest.approx(1e12 / image * each)


def test_a_training_on_latents_reads_three_forward_passes_worth_of_rows() -> None:
    config = load_config("digits")
    cost = model_costs(config, 10)["classifier"]
    need = demand.feed(config, 8, 1, {"train_classifier": cost}, {"train_classifier": 6e9})["train_classifier"]
    assert need["images_per_s"] == pytest.approx(2e9 / cost.flops)
    assert need["cores"] == pytest.approx(2e9 / cost.flops * demand.READ_NUMBER * config.field.numbers)


def test_the_measured_rates_come_out_for_the_images_that_they_were_measured_with() -> None:
    for resolution, rate in ((32, 5500), (256, 270)):
        assert 1 / (demand.DECODE_IMAGE + demand.DECODE_PIXEL * resolution**2) == pytest.approx(rate, rel=0.01)
    assert pytest.approx(79_700, rel=0.03) == 1 / (demand.ARRAY_PIXEL * 32**2)
    config = load_config("paper_cifar10_8x8x16")
    need = demand.feed(config, 32, 3, {}, demand.H100)
    assert need["meta_train"]["images_per_s"] == pytest.approx(7177, rel=0.02)
    without_psnr = need["encode"]["images_per_s"] * 5 / 4  # four passes for the latent, and one for its PSNR
    assert without_psnr == pytest.approx(42_991, rel=0.02)


@pytest.mark.parametrize(("guidance", "halves"), [(0, 1), (1, 1), (3, 2)])
def test_a_sample_takes_a_denoiser_call_a_step_two_with_guidance_and_one_decoding(guidance: int, halves: int) -> None:
    process = [f"diffusion.process.guidance={guidance}", "diffusion.process.sampling_steps=25"]
    config = load_config("digits", [*process, "evaluation.samples=100"])
    denoiser = model_costs(config, 10)["denoiser"]
    decoded = forward_flops(config.field, (8, 8), 1)
    assert demand.sampling_flops(config, denoiser, 8, 1) == 100 * (25 * halves * denoiser.flops + decoded)


def test_requests_follow_from_rows_shards_and_images() -> None:
    settings = ["images.source=folder", "images.location=s3://bucket/images", "encode.augmentation.count=10"]
    config = load_config("digits", [*settings, "encode.shard_rows=512", "encode.chunk_rows=256"])
    found = demand.requests(config, {"train": 1_281_167, "test": 50_000})
    rows = {"train": 11 * 1_281_167, "test": 50_000}
    shards = sum(-(-count // 512) for count in rows.values())
    assert found == {
        "rows": sum(rows.values()), "shards": shards, "objects": 9 * shards, "list": 1332, "read": 1_331_167,
    }  # fmt: skip


def test_a_shard_is_as_many_objects_as_are_counted(tmp_path) -> None:  # type: ignore[no-untyped-def]
    def objects(name: str, images: int) -> int:
        place = new_store(tmp_path / name, {"bits": 32})
        fill(place, [plan(place, n=images, bits=32)])
        return sum(path.is_file() for path in (tmp_path / name).rglob("*"))

    assert objects("more", 40) - objects("few", 16) == 3 * demand.OBJECTS  # of 8 rows


def test_show_prints_what_feeds_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    print_run(describe_run(load_config("digits", ["encode.shard_rows=256"])))
    printed = capsys.readouterr().out
    assert "Images/s that keep this machine's device busy, and cores that read them: meta-train " in printed
    assert "Images/s that keep an H100 busy" in printed
    assert "Samples for the evaluation: " in printed
    assert "The functaset: 1,797 rows in 8 shards, 72 objects, each written by one request\n" in printed


def test_show_warns_of_models_that_need_labels_which_the_images_do_not_have(
    tmp_path, capsys: pytest.CaptureFixture[str]
) -> None:  # type: ignore[no-untyped-def]
    images = class_folders(tmp_path, per_class=40, classes=("only",)) / "only"
    settings = ["images.source=folder", f"images.location={images}", "images.resolution=8", "images.limit=null"]
    print_run(describe_run(load_config("digits", settings)))
    assert "Warning: " in (printed := capsys.readouterr().out)
    assert "the images have no labels, which a classifier needs: set classifier=null" in printed
    without = ["classifier=null", "diffusion.process.conditional=false"]
    print_run(describe_run(load_config("digits", [*settings, *without])))
    assert "Warning: " not in capsys.readouterr().out
