"""A root's bytes without what no two runs have in common: times, rates, process ids, and digests of records with them.

Left out are, by key in every JSON document: EXCLUDED, and `finished` where it is a time. Receipts hold the seconds that
their shard took, so a manifest's digests and sizes of receipts, a commit's of manifests, the checksums of all, and the
size of the functaset in the records of stages are left out too; metrics.json holds times, and so the digest of the
evaluation is. The root's own path and the name of the run's folder, which is a time, are replaced everywhere. In
report.html times, rates and that digest are replaced. Everything else, and the set of files, is compared byte for byte.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from safetensors.numpy import load

EXCLUDED = {
    "seconds", "started", "created", "when", "seconds_by_stage",  # times
    "images_per_s", "meta_images_per_s", "encode_images_per_s", "flops_per_s", "utilization",  # rates
    "owner", "flow_run",  # host, process, start; the run's id at Prefect's server
}  # fmt: skip
SIZES = {
    ("stages/encode.json", "bytes"), ("runs/RUN/run.json", "bytes"), ("stages/evaluate.json", "output_digest"),
}  # fmt: skip
OF_RECEIPTS = {"seconds", "receipt_sha256", "receipt_bytes"}  # columns of a manifest
TIME = re.compile(r"\d{4}-\d\d-\d\dT[\d:.]+Z?")
RATE = re.compile(r'[\d,.]+ (<span class="unit">)?(images/s)')
# The digest of the evaluation, and a class of cells whose text is long, as some roots' paths are.
EVALUATION = re.compile(r"(<bdi>evaluate</bdi></td><td)[^>]*><bdi>[0-9a-f]{16}")
LONG = ' class="long"'
DURATION = re.compile(r"\d[\d,.]* (?:h|min|s)\b(?: \d+ (?:min|s)\b)*")


def comparable(root: Path) -> dict[str, str]:
    """Return by path either the digest of a file, or its text if times had to be left out."""
    (run,) = (folder.name for folder in (root / "runs").iterdir())
    found = {}
    for file in sorted(path for path in root.rglob("*") if path.is_file()):
        name = str(file.relative_to(root)).replace(run, "RUN")
        data = file.read_bytes().replace(str(root).encode(), b"ROOT").replace(run.encode(), b"RUN")
        found[name] = _text(name, data) or hashlib.sha256(data).hexdigest()
    return found


def _text(name: str, data: bytes) -> str:
    """Return the text of a file that holds times, without them; empty for every other file."""
    if name.endswith("commits/00000001.sha256"):
        return "of a commit, which holds digests of manifests"
    if name.endswith("/manifest.safetensors"):
        columns = load(data)
        return str({key: columns[key].tolist() for key in sorted(columns.keys() - OF_RECEIPTS)})
    if name.endswith(".json"):
        return json.dumps(_without_times(name, json.loads(data)), indent=1, sort_keys=True)
    if name.endswith(".jsonl"):
        rows = [_without_times(name, json.loads(line)) for line in data.decode().splitlines()]
        return "\n".join(json.dumps(row, sort_keys=True) for row in rows)
    if name.endswith("report.html"):
        text = EVALUATION.sub(r"\1 DIGEST", TIME.sub("TIME", data.decode().replace(LONG, "")))
        # A training that was killed before its last step makes that one alone, whose rate is not known.
        text = RATE.sub(r"RATE \1\2", text).replace(" \u00b7 RATE images/s", "")
        return DURATION.sub("DURATION", text)
    return ""


def _without_times(name: str, value: Any) -> Any:
    if isinstance(value, list):
        return [_without_times(name, each) for each in value]
    if not isinstance(value, dict):
        return value
    kept = {}
    for key, each in value.items():
        if key in EXCLUDED or (key == "finished" and isinstance(each, str)):
            continue
        if (name, key) in SIZES:
            continue
        if key == "checksum" and ("/receipts/" in name or "/commits/" in name):
            continue
        kept[key] = "" if key == "manifest" and "/commits/" in name else _without_times(name, each)
    return kept
