"""What can be known to fail is told in one line before a server is started or an hour is spent."""

from flows.config import ConfigError, PipelineConfig
from models.denoiser import check_denoiser
from models.grid import patch_shape
from storage.errors import StorageError
from storage.images import open_images
from storage.locations import open_location
from tasks.training.device import choose_device


def preflight(config: PipelineConfig, root: str, stage: str) -> None:
    """Raises ConfigError for a config that fits neither itself nor the images, StorageError for what is not there."""
    images = open_images(config.images)
    try:
        patch_shape((images.resolution, images.resolution), config.field.spatial)
        if stage in ("pipeline", "train_diffusion"):
            check_denoiser(config.diffusion.model, config.field.latent_shape)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    try:
        choose_device(config.dispatch.device)
    except ValueError as error:
        raise StorageError(str(error)) from None
    open_location(root).preflight_write()
