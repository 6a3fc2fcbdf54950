"""A GPU session in one command: train, encode, classify and measure CIFAR-10, in an order of value, call after call.

    python benchmarks/campaign.py --pack SHEETS packs --mib 40             # images to carry, in files of at most 40 MiB
    python benchmarks/campaign.py --minutes 9 --out DIR --images packs     # again and again, until nothing is left
    python benchmarks/campaign.py --out DIR --list                         # what is finished, and minutes of the rest
    python benchmarks/campaign.py --out DIR --table                        # Markdown for docs/results.md

A call never takes longer than its minutes, and ends early on SIGTERM. All that the next one needs is in DIR, which may
be carried from machine to machine: at most eight files of at most 15 MiB. Models of latents are too large for it; they
are begun only where they fit into a call. Images and latents stay in --work, in case the machine is the same.
Needs no Prefect: torch, diffusers, zarr, google-crc32c, pydantic, PyYAML, Pillow, psutil, safetensors, scipy.
--rehearse runs all of it in small, on a CPU too: a test of this file, not a measurement.
"""

import argparse
import sys
import tempfile
import threading
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.session import BEGUN
from benchmarks.session.clock import STOPPED, Clock
from benchmarks.session.kept import Kept
from benchmarks.session.packs import pack, prepare
from benchmarks.session.pieces import PIECES, SMALL_IMAGES, Piece, choose, rehearsal
from benchmarks.session.table import listing, table

LEAST = 2.5  # minutes without which no training on a GPU gets past compiling
SAVE_SECONDS = 60.0


class Saver:
    """Keeps the state in the carried folder: once a minute while a training runs, and when it is asked to."""

    def __init__(self, kept: Kept, work: Path, most: int) -> None:
        self._kept, self._work, self._most = kept, work, most
        self._lock, self._last = threading.Lock(), time.monotonic()

    def now(self) -> None:
        """Save, and name what was left out."""
        with self._lock:
            left_out = self._kept.save(self._work, self._most)
            self._last = time.monotonic()
        for piece in left_out:
            print(f"{piece}: its state does not fit into --state-mib; another machine begins it again", flush=True)

    def sometimes(self) -> None:
        """Save if the last time is a minute ago."""
        if time.monotonic() - self._last >= SAVE_SECONDS:
            self.now()


def work_through(options: argparse.Namespace, kept: Kept) -> int:
    """Do the pieces of this call; return the exit status."""
    work = options.work / kept.plan["id"]
    saver = Saver(kept, work, int(options.state_mib * 2**20))
    clock = Clock(BEGUN, options.minutes, saver.now)
    kept.restore(work)
    kept.check_progress(work)
    images, counts = prepare(options.images, options.work / "images")
    if options.rehearse:
        counts = {split: min(count, SMALL_IMAGES) for split, count in counts.items()}
    work.mkdir(parents=True, exist_ok=True)
    clock.start()
    try:
        import torch

        from benchmarks.session.work import Session

        device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cpu" and not options.rehearse:
            raise SystemExit("torch sees no GPU here: nothing measured (--rehearse runs everything in small)")
        named = torch.cuda.get_device_name() if device == "cuda" else "cpu"
        print(f"{named}, torch {torch.__version__}, {counts['train']} training and {counts['test']} test images")
        session = Session(kept, work, images, counts, device, saver.sometimes)
        made = {"device": named, "torch": torch.__version__}
        _each(pieces_of(options.rehearse), session, clock, made, 0.02 if options.rehearse else LEAST)
    except SystemExit as stopped:
        if stopped.code != STOPPED:
            raise
        return 0 if clock.over else STOPPED
    finally:
        clock.ending()
        saver.now()
    return 0


def _each(pieces: Collection[Piece], session: Any, clock: Clock, made: dict[str, str], least: float) -> None:
    """Do one piece after the other while there is time; one that fails is recorded, and the next one comes."""
    from benchmarks.session.work import run

    failed: set[str] = set()
    while True:
        kept = session.kept
        piece = choose(pieces, failed, kept.finished(), kept.progress, clock.minutes(), least)
        if piece is None:
            return
        print(f"{piece.name}: {clock.minutes():.1f} minutes are left", flush=True)
        row: dict[str, Any] = {"piece": piece.name} | made
        try:
            row |= run(piece, session)
        except Exception as error:
            failed.add(piece.name)
            row["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        kept.add(row)
        print(row, flush=True)


def pieces_of(small: bool) -> tuple[Piece, ...]:
    """Return the pieces of a campaign, or of its rehearsal."""
    return rehearsal(PIECES) if small else PIECES


def main() -> int:
    """Return the exit status: 0 at the end of the minutes or of the work, 143 after SIGTERM."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("campaign"), help="folder that is carried between calls")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--images", type=Path, help="folder of packs, of sheets, or of train.npz and test.npz")
    parser.add_argument(
        "--work", type=Path, default=Path(tempfile.gettempdir(), "functa-campaign"), help="folder of this machine"
    )
    parser.add_argument("--state-mib", type=float, default=40.0, help="most that trainings may leave in --out")
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--pack", type=Path, nargs=2, metavar=("SHEETS", "OUT"))
    parser.add_argument("--mib", type=float, default=60.0, help="most of a pack")
    options = parser.parse_args()
    if options.pack:
        for path in pack(*options.pack, options.mib):
            print(f"{path}: {path.stat().st_size / 2**20:.1f} MiB")
        return 0
    reading = options.list or options.table
    kept = Kept(options.out, None if reading else options.rehearse)
    pieces = pieces_of(kept.plan["rehearsal"])
    if options.table:
        print(table(pieces, kept.finished()))
        return 0
    status = 0 if options.list else work_through(options, kept)
    print(listing(pieces, kept))
    return status


if __name__ == "__main__":
    sys.exit(main())
