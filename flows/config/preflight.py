"""Find what will fail, and report it in one line, before a server is started or an hour is spent."""

from collections.abc import Callable
from functools import partial

from functa.flows.config.consistency import check_field
from functa.flows.config.schema import ConfigError, PipelineConfig
from functa.models.compute.compilation import should_compile
from functa.models.compute.device import choose_device
from functa.models.latents.classifier import check_classifier
from functa.models.latents.denoiser import check_denoiser
from functa.models.measures.wavelets import packet_numbers
from functa.storage.errors import StorageError
from functa.storage.functaset.plan import check_rows
from functa.storage.images.source import Images, open_images
from functa.storage.places.address import open_location
from functa.tasks.dispatch.tracking.job import check_installed
from functa.tasks.evaluation.evaluators import EVALUATORS, chosen
from functa.tasks.evaluation.gate import FIGURES
from functa.tasks.evaluation.generation import efficientnet
from functa.tasks.evaluation.generation.inception import check_counts, weights_digest
from functa.tasks.evaluation.generation.spaces import chosen_spaces, obstacles
from functa.tasks.inference.ready.shipped import check_channels
from functa.tasks.stage_table import STAGES

FEW_TEST_IMAGES = 20  # fewer give figures that another few would change


def preflight(config: PipelineConfig, root: str, stage: str) -> tuple[str, ...]:
    """Return what the user should know of the images.

    Raises ConfigError for a config that contradicts itself, StorageError for images or devices that do not fit it.
    """
    check_models(config, stage)
    check_places(config, root)
    if config.tracking is not None and (stage == "pipeline" or STAGES[stage].trains):
        check_installed(config.tracking)
    images = open_images(config.images)
    if config.field.pretrained is not None:
        check_channels(config.field.pretrained, images.channels)
    try:
        check_field(config.field, images.resolution)
    except ValueError as error:
        raise StorageError(f"{config.images.location}: {error}") from None
    try:
        choose_device(config.dispatch.device)
    except ValueError as error:
        raise StorageError(f"dispatch.{error}") from None
    check_compilers(config, stage)
    check_classes(config, stage, len(images.classes))
    if stage in ("pipeline", "encode"):
        check_row_count(config, images)
    dimensions = check_spaces(config, images) if stage in ("pipeline", "evaluate") else {}
    if stage == "pipeline":
        check_gate_figures(config, images, dimensions)
    open_location(root).preflight_write()
    return (*images.notes, *_few_test_images(config, images), *_few_samples(config, images, dimensions))


def check_spaces(config: PipelineConfig, images: Images) -> dict[str, int]:
    """Return the dimensions of the feature spaces in which samples will be compared; none without samples.

    Raises StorageError for a space that cannot be measured, and for missing or other weights.
    """
    generation, fid = config.evaluation.generation, config.evaluation.fid
    if config.diffusion is None or generation is None:
        return {}
    spaces = chosen_spaces(generation.spaces, images.resolution, len(images.classes))
    if "efficientnet_lite0" in spaces:
        efficientnet.read_weights()
    if fid.weights is not None:
        weights_digest(fid)
        reference = len(images.split("train"))
        check_counts(fid, min(config.evaluation.samples, reference), reference)
    dimensions = {
        "classifier": config.evaluation.pixel_classifier.features, "latent": config.field.numbers,
        "wavelet": packet_numbers(images.resolution, images.channels), "efficientnet_lite0": efficientnet.DIMENSIONS,
    }  # fmt: skip
    return {space: dimensions[space] for space in spaces}


def _samples(config: PipelineConfig, images: Images) -> int:
    return min(config.evaluation.samples, len(images.split("train")))


def _few_samples(config: PipelineConfig, images: Images, dimensions: dict[str, int]) -> list[str]:
    """Return a note where samples are too few for the covariances of some spaces."""
    count = _samples(config, images)
    narrow = {space: wide for space, wide in dimensions.items() if wide >= count}
    if not narrow:
        return []
    named = " and ".join(f"{space} ({wide:,} dimensions)" for space, wide in narrow.items())
    note = f"{count:,} samples are too few for Frechet distances in the feature spaces {named}"
    if max(narrow.values()) < len(images.split("train")):
        return [f"{note}: evaluation.samples above {max(narrow.values()):,} gives them"]
    return [f"{note}, and there are no more training images: kernel distances, precision and recall are measured"]


def _few_test_images(config: PipelineConfig, images: Images) -> list[str]:
    """Return a note where so few images are held out that their figures are rough."""
    count = len(images.split("test"))
    if count >= FEW_TEST_IMAGES:
        return []
    name = config.images.location or config.images.source
    return [
        f"{name}: only {count} test images, so all figures on test images are rough; add images, or hold out more "
        f"(images.test_fraction, or a larger test/)"
    ]


def check_classes(config: PipelineConfig, stage: str, classes: int) -> None:
    """Raise StorageError where a model that needs labels is to be trained on images that have none, or of one class."""
    if not classes:
        _check_without_classes(config, stage)
    if config.classifier is not None and stage in ("pipeline", "train_classifier") and classes < 2:
        raise StorageError(
            f"{config.images.location or config.images.source}: {classes} class was found, and a "
            f"classifier needs two or more: set classifier=null, or sort the images into class folders"
        )


def _check_without_classes(config: PipelineConfig, stage: str) -> None:
    classifier = config.classifier is not None and stage in ("pipeline", "train_classifier")
    process = config.diffusion.process if config.diffusion is not None else None
    conditional = process is not None and process.conditional and stage in ("pipeline", "train_diffusion")
    settings = ["classifier=null"] * classifier + ["diffusion.process.conditional=false"] * conditional
    if settings:
        model = "a classifier" if classifier else "a conditional diffusion model"
        raise StorageError(
            f"{config.images.location}: the images have no labels, which {model} needs: set "
            f"{' and '.join(settings)}, or name a table of labels (images.labels=FILE)"
        )


def check_row_count(config: PipelineConfig, images: Images) -> None:
    """Raise StorageError where all images of a split together make more rows than a fragment holds."""
    views = {"train": 1 + config.encode.augmentation.count, "test": 1}
    rows = {split: count * len(images.split(split)) for split, count in views.items()}
    check_rows(config.images.location or config.images.source, rows)


def check_places(config: PipelineConfig, root: str) -> None:
    """Raise ConfigError where images lie in the root: what a run writes there is no data, and would be taken for it."""
    if not config.images.location:
        return
    images, own = (open_location(uri).uri.rstrip("/") for uri in (config.images.location, root))
    if images == own or images.startswith(f"{own}/"):
        raise ConfigError(
            f"images.location={config.images.location}: lies in the root {root}; choose another --root, which may lie "
            f"among the images"
        )


def check_gate_figures(config: PipelineConfig, images: Images, dimensions: dict[str, int]) -> None:
    """Raise ConfigError where the gate asks for a figure that this config does not measure.

    dimensions: of the feature spaces in which samples are compared.
    """
    models = {name for name in ("classifier", "diffusion") if getattr(config, name) is not None}
    measured = {figure for evaluator in chosen(config.evaluation, models) for figure in evaluator.figures}
    if config.evaluation.fid.weights is None or config.evaluation.fid.any_weights:
        measured.discard("fid")
    for key, (figure, _) in FIGURES.items():
        if getattr(config.gate, key) is None:
            continue
        name, _, space = figure.partition(".")
        why = _why_not_in_space(config, images, dimensions, name, space) if space else ""
        if name not in measured:
            why = _why_unmeasured(config, figure)
        if why:
            raise ConfigError(
                f"gate.{key}: this config does not measure {figure} ({why}); set gate.{key}=null, or have it measured"
            )


def _why_not_in_space(config: PipelineConfig, images: Images, dimensions: dict[str, int], name: str, space: str) -> str:
    """Explain why a figure is not measured in one space; "" where it is."""
    if space not in dimensions:
        reasons = obstacles(images.resolution, len(images.classes))
        return reasons.get(space, "evaluation.generation.spaces leaves it out")
    if name == "fd" and dimensions[space] >= _samples(config, images):
        return f"{dimensions[space]:,} dimensions need more samples than {_samples(config, images):,}"
    if name == "label_agreement" and not (config.diffusion and config.diffusion.process.labelled):
        return "a probe compares labels, and the samples of an unconditional model have none"
    return ""


def _why_unmeasured(config: PipelineConfig, figure: str) -> str:
    evaluator = next(each for each in EVALUATORS if figure.partition(".")[0] in each.figures)
    for model in ("classifier", "diffusion"):
        if model in evaluator.needs and getattr(config, model) is None:
            return f"{model}=null"
    if getattr(config.evaluation, evaluator.name) is None:
        return "evaluation.quick=true" if config.evaluation.quick else f"evaluation.{evaluator.name}=null"
    return "it needs evaluation.fid.weights, the standard file"


def check_compilers(config: PipelineConfig, stage: str) -> None:
    """Raise StorageError where a stage that will run has compile=on and its compiler is not installed."""
    device = choose_device(config.dispatch.device)
    sections = {
        "inner": (config.inner, ("pipeline", "meta_train", "encode")),
        "classifier": (config.classifier, ("pipeline", "train_classifier")),
        "diffusion": (config.diffusion, ("pipeline", "train_diffusion")),
    }
    for name, (section, stages) in sections.items():
        if section is not None and stage in stages and section.compile in ("on", "graphs"):
            try:
                should_compile("on", 0.0, device, f"{name}.compile")
            except ValueError as error:
                raise StorageError(str(error)) from None


def check_models(config: PipelineConfig, stage: str) -> None:
    """Raise ConfigError, naming the key, where a model of that stage (pipeline: of all) cannot take the latent."""
    height, width, channels = config.field.latent_shape  # three: check_sections wants two axes
    shape = (height, width, channels)
    checks: list[tuple[str, Callable[[], None]]] = []
    if config.classifier is not None and stage in ("pipeline", "train_classifier"):
        checks.append(("classifier.model", partial(check_classifier, config.classifier.model, shape)))
    if config.diffusion is not None and stage in ("pipeline", "train_diffusion"):
        checks.append(("diffusion.model", partial(check_denoiser, config.diffusion.model, shape)))
    for section, check in checks:
        try:
            check()
        except ValueError as error:
            raise ConfigError(f"{section}.{error}") from None
