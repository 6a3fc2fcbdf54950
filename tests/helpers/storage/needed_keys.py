"""The objects that a version of a functaset needs, read from its records by hand rather than by the code under test."""

import json
from pathlib import Path

from safetensors.numpy import load


def needed_keys(folder: Path, newest: int) -> set[str]:
    """Return the keys that the newest version, of this number, and the chain of commits need."""
    record = json.loads((folder / f"commits/{newest:08d}.json").read_text())
    keys = set(record["objects"]) | ({record["moments"]["key"]} if record["moments"] else set())
    commits = (path.name for path in (folder / "commits").iterdir() if not path.name.endswith(".partial"))
    keys |= {f"commits/{name}" for name in commits if int(name[:8]) >= record["oldest"]}
    keys |= {named["key"] for named in record["lists"]}
    lists = [json.loads((folder / named["key"]).read_text()) for named in record["lists"]]
    for entry in [entry for found in (*lists, record) for entry in found["fragments"]]:
        path = f"fragments/{entry['fragment']}"
        named = f"{path}/manifest.safetensors"
        blocks = json.loads(load((folder / named).read_bytes())["described"].tobytes())["blocks"]
        keys |= {named} | ({f"{path}/moments/blocks.f8"} if blocks else set())
        plan = json.loads((folder / path / "plan.json").read_text())
        retired = {row for start, stop in entry["retired"] for row in range(start, stop)}
        keys |= {f"{path}/plan.json"} | {f"{path}/{key}" for key in plan["objects"] if "rows/" not in key}
        for shard in range(-(-plan["rows"] // plan["shard_rows"])):
            rows = range(shard * plan["shard_rows"], min((shard + 1) * plan["shard_rows"], plan["rows"]))
            if not set(rows) <= retired:
                receipt = f"{path}/receipts/{shard:06d}.0.json"
                objects = json.loads((folder / receipt).read_text())["objects"]
                keys |= {receipt, f"{path}/rows/{shard:06d}.json"} | {f"{path}/{key}" for key in objects}
    return keys
