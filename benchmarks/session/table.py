"""Show what a campaign has reached: a list for whoever runs it, and Markdown beside the paper's figures."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

from benchmarks.session.kept import Kept
from benchmarks.session.pieces import PAPER, Piece, minutes_left
from functa.flows.config.presets import read_preset

HEAD = "| latent | PSNR, dB | the paper | top-1, % | the paper | Fréchet distance* | training |"


def listing(pieces: Collection[Piece], kept: Kept) -> str:
    """Return a line for each piece: its state, and the minutes that it takes by estimate."""
    finished, progress = kept.finished(), kept.progress
    failed = {row["piece"]: row["error"] for row in kept.results() if "error" in row}
    lines = []
    for piece in pieces:
        minutes = f"about {minutes_left(piece, progress):.1f} minutes"
        whole = ", all in one call" if piece.whole else ""
        if piece.name in finished:
            state = "finished"
        elif progress.get(piece.name):
            state = f"{progress[piece.name]:.0%} of {kept.of(piece.name)['steps']} steps, {minutes}{whole}"
        elif piece.name in failed:
            state = f"failed: {failed[piece.name]}"
        else:
            state = f"{minutes}{whole}"
        lines.append(f"{piece.name:24} {piece.preset:32} {state}")
    return "\n".join(lines)


def table(pieces: Collection[Piece], finished: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the rows of the paper's Tables 1 and 2 that a campaign measures, as Markdown."""
    devices = sorted({f"{row['device']}, torch {row['torch']}" for row in finished.values()})
    lines = ["; ".join(devices) or "nothing is measured yet", "", HEAD, "|---" * (HEAD.count("|") - 1) + "|"]
    for row in dict.fromkeys(piece.row for piece in pieces):
        found = {kind: finished.get(f"{row}/{kind}", {}) for kind in ("field", "classifier", "diffusion")}
        paper = read_preset(PAPER[row]).settings["paper"]
        cells = [
            row,
            _cell(found["field"], lambda f: f"**{f['psnr']:.2f}** (pooled {f['psnr_pooled']:.2f})"),
            str(paper["psnr"]),
            _cell(found["classifier"], lambda f: f"**{100 * f['top1_last']:.1f}**"),
            str(paper["top1"]),
            _cell(found["diffusion"], _distance),
            "; ".join(_training(kind, figures) for kind, figures in found.items() if figures),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", *_notes(finished)])


def _cell(figures: Mapping[str, Any], text: Callable[[Mapping[str, Any]], str]) -> str:
    return text(figures) if figures else "not measured"


def _distance(figures: Mapping[str, Any]) -> str:
    return (
        f"**{figures['fd']:.2f}** (reconstructions {figures['fd_reconstruction']:.2f}, noise {figures['fd_noise']:.2f})"
    )


def _training(kind: str, figures: Mapping[str, Any]) -> str:
    among = " then ".join(f"{count:,}" for count in figures["train_images"])
    return f"{kind}: {figures['seen'] / 1e6:.2f}M of {among} images, {figures['seconds']:.0f} s"


def _notes(finished: Mapping[str, Mapping[str, Any]]) -> list[str]:
    notes = ["PSNR: mean over the images, from float32 latents; training: examples seen, of how many images."]
    tests = sorted({row["test_images"] for row in finished.values() if "test_images" in row})
    if tests:
        notes.append(f"Test images: {', '.join(f'{count:,}' for count in tests)}.")
    samples = [row for row in finished.values() if "samples" in row]
    for row in samples:
        notes.append(
            f"*{row['samples']:,} samples, in the features of a pixel classifier of {100 * row['top1_pixels']:.1f} % "
            "accuracy: not FID."
        )
    return [*notes] if samples else [*notes, "*In the features of the pixel classifier: not FID."]
