"""The folder that is carried from call to call: results, what was decided, and the state of trainings.

results.jsonl           a line for each finished or failed piece
plan.json               steps of each training, images that it saw, its progress, and the parts of the state
state-DIGEST-0of2.bin   a tar, in parts of limited size, of checkpoints and curves; `cat state-*.bin | tar x` opens it
"""

import hashlib
import io
import json
import re
import tarfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from functa.storage.places.address import open_location
from functa.storage.runs.checkpoints import load_checkpoint, newest_step, save_checkpoint
from functa.storage.runs.curve import CURVE

PART = 15 * 2**20  # bytes
CHECKPOINT = re.compile(r"step-(\d+)\.(?:json|safetensors)")
MEMBER = re.compile(rf"[\w ]+/checkpoints/field/(?:{CHECKPOINT.pattern}|{re.escape(CURVE)})")


class Kept:
    """The carried folder, and the working folder on this machine whose state it keeps."""

    def __init__(self, folder: Path, rehearsal: bool | None = None) -> None:
        """Open or begin the folder. Exits if a call that rehearses, or does not, finds one of the other kind."""
        self.folder = folder
        self.plan: dict[str, Any] = {
            "id": uuid.uuid4().hex[:8], "rehearsal": bool(rehearsal), "pieces": {}, "parts": [],
        }  # fmt: skip
        if (folder / "plan.json").exists():
            self.plan = json.loads((folder / "plan.json").read_text())
            if rehearsal not in (None, self.plan["rehearsal"]):
                kind = "a rehearsal" if self.plan["rehearsal"] else "a measurement"
                raise SystemExit(f"{folder}: holds {kind}; name another folder with --out")

    def of(self, piece: str) -> dict[str, Any]:
        """Return what is known of a piece: steps, images, progress; changes are kept by save."""
        known: dict[str, Any] = self.plan["pieces"].setdefault(piece, {})
        return known

    @property
    def progress(self) -> dict[str, float]:
        """Return the share of each training that is done."""
        return {name: known.get("progress", 0.0) for name, known in self.plan["pieces"].items()}

    def results(self) -> list[dict[str, Any]]:
        """Return the lines of results.jsonl."""
        path = self.folder / "results.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def finished(self) -> dict[str, dict[str, Any]]:
        """Return the last result of each finished piece."""
        return {row["piece"]: row for row in self.results() if "error" not in row}

    def add(self, row: dict[str, Any]) -> None:
        """Append a result."""
        lines = [*self.results(), row]
        self.write("results.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode())

    def write(self, name: str, data: bytes) -> None:
        """Write a file of the folder whole or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self.folder / f".{name}.partial"
        partial.write_bytes(data)
        partial.replace(self.folder / name)

    def save(self, work: Path, most: int) -> list[str]:
        """Keep the state of the fields below `work`, at most so many bytes; return what was left out."""
        data, left_out = _packed(work, [name for name in self.plan["pieces"] if name.endswith("/field")], most)
        digest = hashlib.sha256(data).hexdigest()
        count = -(-len(data) // PART)
        names = [f"state-{digest[:8]}-{number}of{count}.bin" for number in range(count)]
        for number, name in enumerate(names):
            self.write(name, data[number * PART : (number + 1) * PART])
        self.plan |= {"parts": names, "sha256": digest}
        self.write("plan.json", json.dumps(self.plan, indent=1).encode())  # from now on the new parts are the state
        for path in self.folder.glob("state-*.bin"):
            if path.name not in names:
                path.unlink()
        return left_out

    def restore(self, work: Path) -> None:
        """Write the kept state below `work`, except fields of which this machine has a newer checkpoint."""
        paths = [self.folder / name for name in self.plan["parts"]]
        if not paths:
            return
        missing = [path.name for path in paths if not path.exists()]
        data = b"".join(path.read_bytes() for path in paths if path.exists())
        if missing or hashlib.sha256(data).hexdigest() != self.plan["sha256"]:
            fault = f"{missing[0]} is missing" if missing else "the parts of the state were altered"
            raise SystemExit(f"{self.folder}: {fault}; bring the whole folder of the last call, or begin a new one")
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            members = [member for member in archive if member.isfile() and MEMBER.fullmatch(member.name)]
            kept = {folder: max(steps) for folder, steps in _steps(members).items()}
            for member in members:
                folder = member.name.rpartition("/")[0]
                if newest_step(open_location(str(work / folder))) < kept.get(folder, 0):
                    _extract(archive, [each for each in members if each.name.startswith(folder)], work)

    def check_progress(self, work: Path) -> None:
        """Forget the progress of trainings that left no checkpoint on this machine."""
        for name, known in self.plan["pieces"].items():
            row, _, kind = name.partition("/")
            if not newest_step(open_location(str(work / row / "checkpoints" / kind))):
                known["progress"] = 0.0


def _steps(members: list[tarfile.TarInfo]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for member in members:
        folder, _, name = member.name.rpartition("/")
        if step := CHECKPOINT.fullmatch(name):
            found.setdefault(folder, []).append(int(step[1]))
    return found


def _extract(archive: tarfile.TarFile, members: list[tarfile.TarInfo], work: Path) -> None:
    """Write members, a checkpoint's marker after its tensors: without the marker there is no checkpoint."""
    for member in sorted(members, key=lambda each: each.name.endswith(".json")):
        path, file = work / member.name, archive.extractfile(member)
        path.parent.mkdir(parents=True, exist_ok=True)
        assert file is not None
        path.write_bytes(file.read())


def _packed(work: Path, pieces: list[str], most: int) -> tuple[bytes, list[str]]:
    """Return a tar of the newest checkpoint and the curve of each field, and the fields that do not fit."""
    buffer, left_out = io.BytesIO(), []
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for piece in pieces:
            files = list(_files(work / piece.removesuffix("/field") / "checkpoints" / "field"))
            if buffer.tell() + sum(path.stat().st_size for path in files) > most:
                left_out.append(piece)
                continue
            for path in files:
                archive.add(path, str(path.relative_to(work)))
    return buffer.getvalue(), left_out


def _files(folder: Path) -> Iterator[Path]:
    newest = newest_step(open_location(str(folder))) if folder.is_dir() else 0
    if not newest:
        return
    for path in sorted(folder.iterdir()):
        step = CHECKPOINT.fullmatch(path.name)
        if path.name == CURVE or (step is not None and int(step[1]) == newest):
            yield path


def forget_optimizer(folder: Path) -> None:
    """Write a finished checkpoint again without its optimiser, of which nothing has to continue."""
    location = open_location(str(folder))
    checkpoint = load_checkpoint(location)
    assert checkpoint is not None and checkpoint.metadata["finished"]
    tensors = {name: value for name, value in checkpoint.tensors.items() if not name.startswith("optimizer.")}
    save_checkpoint(location, checkpoint.step, tensors, checkpoint.metadata, keep=1)
