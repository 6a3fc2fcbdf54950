"""Take a shipped field in place of a trained one: the checkpoint that a training would have left."""

from functa.storage.errors import StorageError
from functa.storage.images.source import open_images
from functa.storage.places.address import open_location
from functa.storage.runs.checkpoints import save_checkpoint
from functa.storage.runs.weights import write_weights
from functa.tasks.inference.ready import shipped
from functa.tasks.trained import weights_digest
from functa.tasks.training_jobs import MetaTrainJob


def adopt(job: MetaTrainJob) -> str:
    """Write the checkpoint of the shipped field that the job's config names; return the digest of its weights.

    Raises StorageError where the images do not fit it, or the config is not the shipped field's.
    """
    name = str(job.field.pretrained)
    record = shipped.find(name)
    own = record.field.model_copy(update={"spatial": job.field.spatial, "pretrained": name})
    images = open_images(job.images)
    if own != job.field or images.resolution != job.field.spatial * record.patch:
        raise StorageError(
            f"field.pretrained={name}: the other settings of field are not those of that field at these images; make "
            f"the config with load_config, which takes them from it"
        )
    shipped.check_channels(name, images.channels)
    tensors = shipped.read_tensors(open_location(shipped.FOLDER), name, record)
    arrays = {f"model.{key}": value for key, value in tensors.items()}
    metadata = {
        "field": job.field.model_dump(mode="json", exclude=job.field.unused),
        "inner": job.inner.model_dump(mode="json", exclude=job.inner.unused),
        "image_channels": images.channels, "resolution": images.resolution, "images": 0, "seconds": 0.0,
        "digest": job.digest, "finished": True, "weights_digest": weights_digest(arrays), "pretrained": record.digest,
    }  # fmt: skip
    location = open_location(job.output)
    write_weights(location, tensors, {"stage": "meta_train", "step": 0} | metadata)
    save_checkpoint(location, 0, arrays, metadata)
    return str(metadata["weights_digest"])
