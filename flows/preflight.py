"""What can be known to fail is told in one line before a server is started or an hour is spent."""

from flows.config import ConfigError, PipelineConfig
from flows.fit import check_field
from models.classifier import check_classifier
from models.denoiser import check_denoiser
from storage.errors import StorageError
from storage.images import open_images
from storage.locations import open_location
from tasks.evaluation.inception import check_counts, weights_digest
from tasks.training.device import choose_device


def preflight(config: PipelineConfig, root: str, stage: str) -> None:
    """Raises ConfigError for a config that does not fit itself, StorageError for a world that it does not fit."""
    try:
        if config.classifier is not None and stage in ("pipeline", "train_classifier"):
            check_classifier(config.classifier.model, config.field.latent_shape)
        if config.diffusion is not None and stage in ("pipeline", "train_diffusion"):
            check_denoiser(config.diffusion.model, config.field.latent_shape)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    images = open_images(config.images)
    try:
        check_field(config.field, images.resolution)
    except ValueError as error:
        raise StorageError(f"{config.images.location}: {error}") from None
    try:
        choose_device(config.dispatch.device)
    except ValueError as error:
        raise StorageError(str(error)) from None
    fid = config.evaluation.fid
    if fid.weights is not None and config.diffusion is not None and stage in ("pipeline", "evaluate"):
        weights_digest(fid)
        reference = len(images.split("train"))
        check_counts(fid, min(config.evaluation.samples, reference), reference)
    open_location(root).preflight_write()
