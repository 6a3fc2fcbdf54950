"""Every preset loads, is complete and marks the origin of its settings; the paper's numbers, literally."""

import re
from typing import Any

import pytest
import yaml

from functa.flows.cli.presets import describe_preset
from functa.flows.config.demand import sampling_flops
from functa.flows.config.digests import digest, stage_config
from functa.flows.config.estimate import model_costs, training_flops
from functa.flows.config.load import load_config
from functa.flows.config.presets import preset_names, read_preset
from functa.flows.config.schema import PipelineConfig
from functa.models.field.cost import encode_passes, forward_flops, outer_flops
from functa.models.latents.classifier import check_classifier
from functa.models.latents.denoiser import check_denoiser
from functa.storage.images.sources import known_shape
from tests.helpers.preset_text import preset_text

PAPER = [name for name in preset_names() if name.startswith("paper_")]
IMAGES = {  # for training, for testing
    "cifar10": (50_000, 10_000),
    "imagenet": (1_281_167, 50_000),
    "celeba_hq": (27_000, 3_000),
    "fashion_mnist": (60_000, 10_000),
    "kodak": (384, 24),
    "photographs": (2048, 192),
}
DESCRIPTIONS = ("name", "purpose", "time", "extends", "paper", "provenance")  # describe a preset and set nothing
OWN_IMAGES = ("digits", "cifar10_quick", "photos_64", "photos_128")  # what they cost depends on the user's images

TABLE_1 = {256: (27.6, 66.7, 78.2), 512: (31.9, 68.3, 96.1), 1024: (38.1, 66.7, 134.8)}
TABLE_2 = {  # PSNR, top-1, FID unconditional and conditional
    "8x8x16": (37.2, 90.3, 16.5, 11.2),
    "8x8x16_linear": (35.6, 83.0, 25.6, 11.6),
    "4x4x64": (39.0, 88.2, 44.6, 10.4),
    "4x4x64_linear": (35.3, 80.8, 71.2, 11.0),
}
TABLE_3 = {  # PSNR, top-1, FID conditional
    "8x8x256": (28.3, 76.6, 17.9),
    "8x8x512": (30.6, 76.5, 23.5),
    "8x8x1024": (25.7, 76.5, None),
    "16x16x64": (28.9, 80.4, 12.5),
    "16x16x128": (37.8, 80.7, 10.5),
    "16x16x256": (37.2, 80.6, 11.7),
    "32x32x16": (28.6, None, 12.4),
    "32x32x32": (31.7, None, 10.5),
    "32x32x64": (37.7, None, 8.8),
    "32x32x64_3x3": (38.4, None, 8.5),
}
TABLE_4 = {  # width, depth, outer learning rate; C.1: steps
    "8x8x16": (256, 6, 3e-5, 200_000),
    "8x8x16_linear": (256, 6, 1e-4, 200_000),
    "4x4x64": (256, 10, 3e-5, 500_000),
    "4x4x64_linear": (256, 10, 3e-5, 500_000),
}
TABLE_5 = {  # normalization scale, width, feed-forward width, blocks, learning rate, dropout, batch
    "8x8x16": (0.08, 128, 256, 12, 1e-2, 0.1, 256),
    "8x8x16_linear": (0.1, 128, 256, 12, 1e-2, 0.2, 256),
    "4x4x64": (0.01, 384, 768, 12, 2e-3, 0.1, 512),
    "4x4x64_linear": (0.01, 384, 768, 16, 2e-3, 0.2, 512),
}
TABLE_6 = {  # schedule, residual blocks, multipliers, attention, dropout
    "8x8x16": ("linear", 1, (1, 1), (4,), 0.4),
    "8x8x16_linear": ("cosine", 2, (2, 2), (), 0.4),  # the paper has (2,), which is no level: docs/paper.md
    "4x4x64": ("cosine", 2, (2, 2), (), 0.4),
    "4x4x64_linear": ("cosine", 2, (2, 2), (4,), 0.4),
    "8x8x16_cond": ("cosine", 3, (2, 2, 2), (8,), 0.1),
    "8x8x16_linear_cond": ("cosine", 3, (2, 2, 2), (8, 4), 0.0),
    "4x4x64_cond": ("cosine", 3, (2, 2), (4,), 0.0),
    "4x4x64_linear_cond": ("cosine", 3, (2, 2, 2), (4, 2), 0.0),
}


def leaves(value: Any, prefix: str = "") -> list[str]:
    """Dotted keys of everything that a preset sets."""
    if not isinstance(value, dict):
        return [prefix]
    return [leaf for key, below in value.items() for leaf in leaves(below, f"{prefix}.{key}".lstrip("."))]


@pytest.mark.parametrize("name", preset_names())
def test_every_key_that_a_preset_sets_is_the_papers_or_assumed(name: str) -> None:
    data = yaml.safe_load(preset_text(name))
    described = {key: data.pop(key) for key in DESCRIPTIONS if key in data}
    marks = load_config(name).provenance
    assert [key for key in leaves(data) if not marks.of(key)] == []
    if name in PAPER:  # one by one, and nothing that is not set
        assert sorted(leaves(data)) == sorted([*marks.paper, *marks.assumed])
    else:
        assert not marks.paper
    assert described["name"] == name


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_fits_its_images_and_its_models_fit_the_latent(name: str) -> None:
    config = load_config(name)
    resolution, channels, _ = known_shape(config.images)
    assert resolution is not None
    assert channels is not None
    assert resolution % config.field.spatial == 0
    assert config.field.numbers <= resolution**2 * channels
    if config.classifier is not None:
        check_classifier(config.classifier.model, config.field.latent_shape)
    if config.diffusion is not None:
        check_denoiser(config.diffusion.model, config.field.latent_shape)


@pytest.mark.parametrize("name", [name for name in preset_names() if name not in OWN_IMAGES])
def test_a_presets_head_gives_its_command_and_its_cost(name: str) -> None:
    head = re.match(r"(#.*\n)+", preset_text(name))
    assert head is not None
    assert f"functa run {name} " in head[0]
    work = re.search(r"meta-training (\S+) FLOPs, encoding (\S+) FLOPs; at 20 TFLOP/s", head[0])
    assert work is not None
    config = load_config(name)
    resolution, channels, _ = known_shape(config.images)
    assert resolution is not None
    assert channels is not None
    sides, training = (resolution, resolution), config.meta_train
    one = outer_flops(config.field, config.inner, sides, channels, training.patches_per_image)
    assert float(work[1]) == pytest.approx(one * training.steps * training.batch, rel=0.01)
    encoding = encode_passes(config.inner) * forward_flops(config.field, sides, channels)
    train, test = IMAGES[config.images.location]
    rows = (1 + config.encode.augmentation.count) * train + test
    assert float(work[2]) == pytest.approx(encoding * rows, rel=0.01)


@pytest.mark.parametrize("name", [name for name in preset_names() if name not in OWN_IMAGES])
def test_a_presets_head_gives_the_work_of_learning_on_latents(name: str) -> None:
    """With the classes of the data sets: the config does not give those of folders and npz files."""
    config = load_config(name)
    stated = {
        model: float(flops) for model, flops in re.findall(r"(classifier|denoiser) (\S+) FLOPs", preset_text(name))
    }
    counted = training_flops(config, 1000 if "imagenet" in name else 10)
    assert stated == pytest.approx(counted, rel=0.01)


@pytest.mark.parametrize("name", [name for name in preset_names() if name not in OWN_IMAGES])
def test_a_presets_head_gives_the_work_of_its_samples(name: str) -> None:
    config, classes = load_config(name), 1000 if "imagenet" in name else 10
    stated = re.search(r"# Samples: (\S+) FLOPs; at the same rate [0-9.]+ (s|min|h|days)\.", preset_text(name))
    assert (stated is None) == (config.diffusion is None)
    if stated is not None:
        resolution, channels, _ = known_shape(config.images)
        assert resolution is not None and channels is not None
        counted = sampling_flops(config, model_costs(config, classes)["denoiser"], resolution, channels)
        assert float(stated[1]) == pytest.approx(counted, rel=0.01)


@pytest.mark.parametrize("name", PAPER)
def test_the_time_of_a_preset_of_the_paper_is_that_of_its_work(name: str) -> None:
    works = re.findall(r"(?:meta-training|encoding|classifier|denoiser|Samples:) (\d\S+) FLOPs", preset_text(name))
    hours = sum(map(float, works)) / 20e12 / 3600
    time = re.fullmatch(r"(\d+) (h|days) at 20 TFLOP/s", read_preset(name).time)
    assert time is not None
    assert float(time[1]) == pytest.approx(hours if time[2] == "h" else hours / 24, abs=0.51)


@pytest.mark.parametrize("name", PAPER)
def test_what_a_classifier_learns_from_is_augmented_as_in_b1_and_c(name: str) -> None:
    config = load_config(name)
    augmentation, marks = config.encode.augmentation, config.provenance
    if config.classifier is None:
        assert augmentation.count == 0
        return
    if "cifar10" in name:
        assert (augmentation.count, augmentation.kind, augmentation.padding) == (50, "crop", 4)
        assert config.images.resolution in (None, 32)  # 32 + 2 x 4 = 40, of which 32x32 are cropped
        assert augmentation.operations == 0
        given = ("count", "kind", "padding")
    else:
        assert (augmentation.kind, augmentation.operations, augmentation.magnitude) == ("distort", 2, 5)
        assert augmentation.count > 0  # the paper does not give how many
        given = ("kind", "operations", "magnitude")
    assert augmentation.flip == 0.5
    assert {f"encode.augmentation.{key}" for key in given} <= set(marks.paper)
    rows = (1 + augmentation.count) * IMAGES[config.images.location][0]
    assert rows / config.encode.shard_rows / config.encode.group_shards < 500  # tasks of one encoding


def test_there_is_a_preset_for_every_row_of_tables_1_2_and_3() -> None:
    rows = [f"paper_cifar10_vector_{numbers}" for numbers in TABLE_1]
    rows += ["paper_cifar10_vector_256_transformer"]  # B.1's best Transformer
    rows += [f"paper_cifar10_{row}" for row in TABLE_6]
    rows += [f"paper_imagenet_{row}" for row in TABLE_3]
    rows += [f"paper_celeba_64x64_{numbers}" for numbers in (64, 128, 256, 512, 1024)]
    assert sorted(rows) == sorted(PAPER)


@pytest.mark.parametrize("name", PAPER)
def test_what_the_paper_does_everywhere(name: str) -> None:
    config = load_config(name)
    assert (config.inner.steps, config.inner.rates) == (3, "element")
    training = config.meta_train
    assert (training.decay, training.warmup, training.clip_norm, training.ema) == ("constant", 0, None, 0)
    assert config.inner.loss == ("patch" if config.field.spatial > 1 else "image")
    bilinear = name.endswith(("linear", "linear_cond"))
    assert config.field.interpolation == ("bilinear" if bilinear else "nearest")
    assert config.field.coordinates == ("binary" if bilinear else "patch")
    assert config.field.kernel == (3 if name.endswith("3x3") else 1)
    size = re.search(r"_(\d+)x\1x(\d+)", name)
    if size is not None and "celeba" not in name:
        assert (config.field.spatial, config.field.channels) == (int(size[1]), int(size[2]))


@pytest.mark.parametrize("numbers", TABLE_1)
def test_table_1_and_b1(numbers: int) -> None:
    config = load_config(f"paper_cifar10_vector_{numbers}")
    psnr, top1, fid = TABLE_1[numbers]
    assert config.paper == {"psnr": psnr, "top1": top1, "fid_uncond": fid}
    field, training = config.field, config.meta_train
    assert (field.spatial, field.channels, field.width, field.depth, field.w0) == (1, numbers, 512, 15, 30)
    assert (training.batch, training.learning_rate, training.steps) == (128, 3e-6, 500_000)


@pytest.mark.parametrize("numbers", TABLE_1)
def test_b1_gives_the_mlp_of_512_numbers(numbers: int) -> None:
    config = load_config(f"paper_cifar10_vector_{numbers}")
    assert config.classifier is not None
    model = config.classifier.model
    check_b1(config, factor=0.01)
    assert (model.kind, model.width, model.depth, model.dropout) == ("mlp", 1024, 3, 0.2)
    best = ["learning_rate", "weight_decay", "label_smoothing", "normalization.factor"]
    best += ["model.width", "model.depth", "model.dropout"]
    of_all = ["steps", "batch", "ema", "normalization.kind", "model.kind"]
    assert marks_of(config, "classifier", of_all) == {"paper"}
    assert marks_of(config, "classifier", best) == {"paper" if numbers == 512 else "assumed"}


def test_b1_gives_the_transformer_of_256_numbers() -> None:
    """A preset that takes over field and functaset of paper_cifar10_vector_256 by --from."""
    first, config = load_config("paper_cifar10_vector_256"), load_config("paper_cifar10_vector_256_transformer")
    for stage in ("meta_train", "encode"):
        assert digest(stage_config(first, stage)) == digest(stage_config(config, stage))
    assert config.paper == {"psnr": 27.6, "top1": 63.5}
    assert config.diffusion is None
    assert config.classifier is not None
    model = config.classifier.model
    check_b1(config, factor=0.1)
    assert (model.kind, model.width, model.mlp_ratio * model.width) == ("transformer", 256, 512)
    assert (model.depth, model.dropout, model.token_channels) == (2, 0.1, 1)
    given = ["learning_rate", "weight_decay", "label_smoothing", "steps", "batch", "ema"]
    given += ["normalization.kind", "normalization.factor"]
    given += [f"model.{key}" for key in ("kind", "width", "depth", "mlp_ratio", "dropout")]
    assert marks_of(config, "classifier", given) == {"paper"}
    assert marks_of(config, "classifier.model", ["heads", "token_channels"]) == {"assumed"}


def check_b1(config: PipelineConfig, factor: float) -> None:
    """Check the settings that both of B.1's best classifiers have."""
    assert config.classifier is not None
    training, normalization = config.classifier, config.classifier.normalization
    assert (training.steps, training.batch, training.learning_rate, training.ema) == (300_000, 256, 1e-3, 0.9999)
    assert (training.label_smoothing, training.weight_decay) == (0.1, 0.1)
    assert (normalization.kind, normalization.factor) == ("fixed", factor)


def marks_of(config: PipelineConfig, section: str, keys: list[str]) -> set[str]:
    return {config.provenance.of(f"{section}.{key}") for key in keys}


@pytest.mark.parametrize("numbers", TABLE_1)
def test_b1_gives_the_denoiser_of_256_numbers(numbers: int) -> None:
    config = load_config(f"paper_cifar10_vector_{numbers}")
    assert config.diffusion is not None
    training, process, model = config.diffusion, config.diffusion.process, config.diffusion.model
    assert (training.steps, training.batch) == (1_000_000, 128)
    assert (training.learning_rate, training.warmup, training.decay) == (3e-4, 4000, "inverse_sqrt")
    assert (training.normalization.kind, training.normalization.gamma) == ("array", 1)  # elementwise mean and sd
    assert (model.kind, model.channels, model.blocks) == ("mlp", 4096, 2)
    assert (process.conditional, process.guidance, process.sampler) == (False, 1, "ddpm")
    assert (process.timesteps, process.schedule, process.timestep_ratio) == (1000, "cosine", 1)  # App. C's
    of_all = ["steps", "batch", "learning_rate", "warmup", "decay", "normalization.kind", "normalization.gamma"]
    of_all += ["process.conditional", "process.sampler", "model.kind"]
    silent = ["ema", "process.timesteps", "process.schedule", "process.timestep_ratio", "process.sampling_steps"]
    silent += ["process.variance", "process.clip", "model.dropout"]
    assert marks_of(config, "diffusion", of_all) == {"paper"}
    assert marks_of(config, "diffusion", silent) == {"assumed"}
    best = marks_of(config, "diffusion.model", ["channels", "blocks"])
    assert best == {"paper" if numbers == 256 else "assumed"}


@pytest.mark.parametrize("numbers", [64, 128, 256, 512, 1024])
def test_section_3_on_celeba(numbers: int) -> None:
    field = load_config(f"paper_celeba_64x64_{numbers}").field
    assert (field.spatial, field.channels, field.width, field.depth, field.w0) == (1, numbers, 512, 15, 30)


@pytest.mark.parametrize("row", TABLE_6)
def test_tables_2_4_5_and_6(row: str) -> None:
    config, like = load_config(f"paper_cifar10_{row}"), row.removesuffix("_cond")
    assert tuple(config.paper[key] for key in ("psnr", "top1", "fid_uncond", "fid_cond")) == TABLE_2[like]
    field, training = config.field, config.meta_train
    assert (field.width, field.depth, training.learning_rate, training.steps) == TABLE_4[like]
    assert (field.w0, training.batch) == (10, 128)
    check_table_5(config, TABLE_5[like])
    assert config.diffusion is not None
    process, model = config.diffusion.process, config.diffusion.model
    drawn = (process.schedule, model.blocks, model.multipliers, model.attention, model.dropout)
    assert drawn == TABLE_6[row]
    assert (model.channels, config.diffusion.steps, config.diffusion.batch) == (320, 500_000, 256)
    assert config.diffusion.learning_rate == 1e-4
    assert (config.diffusion.normalization.kind, config.diffusion.normalization.gamma) == ("vector", 2)
    conditional = row.endswith("_cond")
    assert (process.conditional, process.guidance, process.label_drop) == (conditional, 5 if conditional else 1, 0.2)
    assert process.timesteps == 1000


def check_table_5(config: PipelineConfig, row: tuple[float, ...]) -> None:
    assert config.classifier is not None
    training, model = config.classifier, config.classifier.model
    check_factor(config, row[0], "paper")
    feed_forward = model.mlp_ratio * model.width
    assert (model.width, feed_forward, model.depth, training.learning_rate, model.dropout, training.batch) == row[1:]
    assert model.kind == "transformer"
    assert (model.heads, training.label_smoothing, training.weight_decay) == (16, 0.1, 0.1)
    assert training.steps == 100_000


def check_factor(config: PipelineConfig, factor: float, mark: str) -> None:
    """Check the factor that divides the classifier's latents, and whether the paper gives it for this row."""
    assert config.classifier is not None
    normalization = config.classifier.normalization
    assert (normalization.kind, normalization.factor) == ("fixed", factor)
    assert marks_of(config, "classifier.normalization", ["kind", "factor"]) == {mark}


@pytest.mark.parametrize("row", ["8x8x16", "8x8x16_linear", "4x4x64", "4x4x64_linear"])
def test_the_conditional_row_differs_in_the_diffusion_alone(row: str) -> None:
    """So that it takes over field, functaset and classifier by --from."""
    first, second = (load_config(f"paper_cifar10_{name}").model_dump() for name in (row, f"{row}_cond"))
    assert {key for key in first if first[key] != second[key]} == {"name", "diffusion", "provenance"}


@pytest.mark.parametrize("row", TABLE_3)
def test_table_3(row: str) -> None:
    config = load_config(f"paper_imagenet_{row}")
    assert config.images.resolution == 256
    psnr, top1, fid = TABLE_3[row]
    figures = {"psnr": psnr, "top1": top1, "fid_cond": fid}
    assert config.paper == {"classes": 1000} | {key: value for key, value in figures.items() if value is not None}
    assert (config.classifier is None) == (top1 is None)
    assert (config.diffusion is None) == (fid is None)
    assert (config.meta_train.batch, config.meta_train.steps) == (16, 500_000)
    if config.classifier is not None:  # C.3 gives one factor, for 16x16x128
        check_factor(config, 0.005, "paper" if row == "16x16x128" else "assumed")
    if config.diffusion is not None:
        assert config.diffusion.process.guidance == 5


def test_c3_literally() -> None:
    wide, fine = load_config("paper_imagenet_16x16x128"), load_config("paper_imagenet_32x32x64_3x3")
    assert (wide.field.width, wide.field.depth, wide.field.w0, wide.meta_train.learning_rate) == (256, 12, 20, 1e-5)
    assert (fine.field.width, fine.field.depth, fine.field.w0, fine.meta_train.learning_rate) == (256, 8, 10, 3e-5)
    classifier, diffusion = wide.classifier, fine.diffusion
    assert classifier is not None
    assert diffusion is not None
    assert classifier.steps == round(200 * 1_281_167 / 1024)
    assert (classifier.learning_rate, classifier.batch) == (1e-3, 1024)
    assert (classifier.label_smoothing, classifier.weight_decay) == (0.1, 0.2)
    model = classifier.model
    assert (model.width, model.mlp_ratio * model.width, model.depth) == (768, 1536, 18)
    assert (model.heads, model.dropout) == (16, 0.2)
    assert (diffusion.steps, diffusion.batch, diffusion.learning_rate) == (1_500_000, 256, 1e-4)
    assert (diffusion.normalization.kind, diffusion.normalization.gamma) == ("vector", 2.5)
    assert (diffusion.process.label_drop, diffusion.process.schedule) == (0.2, "cosine")
    unet = diffusion.model
    assert (unet.blocks, unet.channels, unet.multipliers) == (2, 320, (1, 2, 2, 2))
    assert (unet.attention, unet.dropout) == ((8, 16), 0)


@pytest.mark.parametrize("name", [name for name in preset_names() if name.endswith("_fast")])
def test_a_tuned_preset_is_of_the_field_alone(name: str) -> None:
    config = load_config(name)
    assert config.classifier is config.diffusion is None
    assert (config.images.source, config.images.location) == ("npz", "cifar10")


# Millions of parameters, from the reference notes; C.3's own figure for the classifier, 64M, does not follow from it.
DENOISERS = {
    "paper_cifar10_8x8x16": 34.949, "paper_cifar10_8x8x16_linear": 157.153, "paper_cifar10_4x4x64": 157.706,
    "paper_cifar10_4x4x64_linear": 165.917, "paper_cifar10_8x8x16_cond": 312.920,
    "paper_cifar10_8x8x16_linear_cond": 324.415, "paper_cifar10_4x4x64_cond": 214.296,
    "paper_cifar10_4x4x64_linear_cond": 324.968, "paper_imagenet_32x32x64_3x3": 277.402,
}  # fmt: skip
CLASSIFIERS = {
    "paper_cifar10_8x8x16": 1.60, "paper_cifar10_8x8x16_linear": 1.60, "paper_cifar10_4x4x64": 14.24,
    "paper_cifar10_4x4x64_linear": 18.98, "paper_imagenet_16x16x128": 86.15,
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(DENOISERS | CLASSIFIERS))
def test_presets_report_the_parameters_of_the_papers_models(name: str) -> None:
    """In `functa presets --json`, counted on the meta device, ImageNet's without its images."""
    counts = describe_preset(load_config(name))["parameters"]
    if name in DENOISERS:
        assert round(counts["denoiser"] / 1e6, 3) == DENOISERS[name]
    if name in CLASSIFIERS:
        assert round(counts["classifier"] / 1e6, 2) == CLASSIFIERS[name]
    assert counts["field"] is not None or "imagenet" in name


@pytest.mark.parametrize("name", ["photos_64", "photos_128"])
def test_a_few_dozen_photographs_have_a_frechet_distance(name: str) -> None:
    """There are at most as many samples as training images, and a distance needs more than there are features."""
    config = load_config(name).evaluation
    assert config.pixel_classifier.features < 50 < config.samples
