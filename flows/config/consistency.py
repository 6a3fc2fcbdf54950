"""Check that field, images and trainings fit each other, before any work. Free of torch."""

from collections.abc import Mapping

from functa.models.config import FieldConfig
from functa.models.field.cost import coordinate_bits
from functa.storage.config import ImagesConfig
from functa.storage.images.sources import known_shape
from functa.tasks.config import LatentTrainingConfig, MetaTrainConfig


def check_field(field: FieldConfig, resolution: int) -> None:
    """Raise ValueError where the field cannot take images of this resolution."""
    if resolution % field.spatial:
        raise ValueError(
            f"images of {resolution}x{resolution} pixels are not divisible into {field.spatial}x{field.spatial} latent "
            f"positions: choose field.spatial among the divisors of {resolution}, or another images.resolution"
        )
    if field.coordinates == "binary":
        coordinate_bits(resolution)


def check_sections(images: ImagesConfig, field: FieldConfig, meta_train: MetaTrainConfig) -> None:
    """Raise ValueError where the sections contradict each other; no image is read."""
    if field.axes != 2:
        raise ValueError(
            f"field.axes={field.axes}: the pipeline works on images, which have 2 axes; set field.axes=2 "
            f"(fields of 1 and 3 axes can be used from Python, see models/field/field.py)"
        )
    resolution = known_shape(images)[0]
    if resolution is not None:
        check_field(field, resolution)
    patches = meta_train.patches_per_image
    if patches is not None and not field.independent:
        raise ValueError(
            f"meta_train.patches_per_image={patches} needs patches that depend on their own latent alone: leave it "
            f"empty, or set field.interpolation=nearest, field.kernel=1 and field.mixer=0"
        )
    if patches is not None and patches > field.positions:
        raise ValueError(
            f"meta_train.patches_per_image={patches} exceeds the {field.positions} latent positions of an image: "
            f"choose at most that, or leave it empty"
        )


def check_shown_channel(field: FieldConfig, channel: int | None) -> None:
    """Raise ValueError where the channel that the report is to show moved is none of the latents'."""
    if channel is None:
        return
    if field.spatial == 1:
        raise ValueError(
            f"evaluation.perturbation.show_channel={channel} is for spatial latents: a vector has entries, of which "
            f"those of largest, median and lowest effect are shown; leave it empty"
        )
    if channel >= field.channels:
        raise ValueError(
            f"evaluation.perturbation.show_channel={channel}: a latent has channels 0 to {field.channels - 1}; choose "
            f"one of them"
        )


def check_micro_batches(sections: Mapping[str, MetaTrainConfig | LatentTrainingConfig | None]) -> None:
    """Raise ValueError where a section, given by its name, has a larger micro-batch than batch."""
    for name, section in sections.items():
        micro = None if section is None else section.micro_batch
        if section is not None and micro is not None and micro > section.batch:
            raise ValueError(
                f"{name}.micro_batch={micro} exceeds {name}.batch={section.batch}: choose at most that, "
                f"or leave it empty"
            )


def check_devices(batches: Mapping[str, int], devices: int, nodes: int) -> None:
    """Raise ValueError where a batch, given by its dotted key, has fewer examples than there are processes."""
    of_nodes = f" on each of dispatch.nodes={nodes}" if nodes > 1 else ""
    for key, batch in batches.items():
        if batch < devices * nodes:
            raise ValueError(
                f"{key}={batch} cannot be split over dispatch.devices={devices}{of_nodes}: choose at least "
                f"{devices * nodes}, or lower dispatch.devices"
            )


def latent_surplus(field: FieldConfig, resolution: int | None, channels: int | None) -> str | None:
    """Return a warning if a latent has more numbers than its image has values, else None."""
    if resolution is None or channels is None or field.numbers <= resolution**2 * channels:
        return None
    return (
        f"a latent of {'x'.join(map(str, field.latent_shape))} has {field.numbers} numbers, more than the "
        f"{resolution**2 * channels} values of a {resolution}x{resolution}x{channels} image: it compresses nothing; "
        f"lower field.spatial or field.channels unless this is intended"
    )
