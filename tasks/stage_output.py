"""Find what a finished stage of a root produced. Free of torch, so that a missing model is reported at once."""

from functa.storage.errors import StorageError
from functa.storage.places.location import Location
from functa.storage.runs.stage_records import output_location, read_record
from functa.tasks.stage_table import STAGES


def stage_output(root: Location, stage: str) -> Location:
    """Return where a finished stage's output is. Raises StorageError with the reason and the fix if there is none."""
    record = read_record(root, stage)
    # A functaset that is receiving new images can be read at its newest commit.
    if record is not None and (record.state == "finished" or (record.state == "running" and record.output_digest)):
        return output_location(record, root)
    raise StorageError(f"{root.uri}: {_why_missing(root, stage)}")


def _why_missing(root: Location, name: str) -> str:
    records = [record for each in STAGES if (record := read_record(root, each)) is not None]
    if not records:
        return "no run has been started there; name the root of a run, as `functa run PRESET --root ROOT` makes it"
    newest, stage = max(records, key=lambda record: record.started), STAGES[name]
    begin, section = f"`functa {stage.command} PRESET --root {root.uri}", stage.optional_section
    if section and newest.pipeline.get(section, {}) is None:
        return (
            f"its config has {section}=null, so it has no {stage.product}; "
            f"{begin} --set {section}={{}}` trains one with default settings"
        )
    return f"{stage.command} has not finished there; run {begin}` first"
