"""A digits run of seconds: every stage really runs, for a few steps on a few images."""

TINY = [
    "images.limit=200",
    *(
        f"{section}.{key}"
        for section in ("meta_train", "classifier", "diffusion", "evaluation.pixel_classifier")
        for key in ("steps=20", "warmup=0")
    ),
    "meta_train.validation_images=16",
    "encode.shard_rows=64",
    "encode.chunk_rows=32",
    "encode.group_shards=2",
    "diffusion.process.sampling_steps=4",
    "evaluation.samples=100",
]
