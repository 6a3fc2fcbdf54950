"""Headline figures, each beside what it has to be judged against."""

from dataclasses import dataclass
from typing import Any

from functa.tasks.evaluation.catalogue import SPACES
from functa.tasks.report.blocks import ReportData
from functa.tasks.report.overview.summary import shape_of
from functa.tasks.report.words import number, show


@dataclass(frozen=True)
class Card:
    """One headline figure; `share` places it between floor (0) and ceiling (1) where it has both."""

    name: str
    value: str
    unit: str = ""
    beside: tuple[str, ...] = ()
    share: float | None = None


def cards(data: ReportData) -> list[Card]:
    """Return the headline figures that were measured."""
    metrics = data.metrics
    found = [_latent(data), _psnr(metrics), _top1(metrics), *_distances(metrics), _rates(metrics)]
    return [card for card in found if card is not None]


def _psnr(metrics: dict[str, Any]) -> Card | None:
    value = number(metrics, "psnr_test")
    if value is None:
        return None
    known = (("patch PCA", "psnr_pca_patch"), ("whole-image PCA", "psnr_pca_image"))
    beside = tuple(f"{name} {base:.1f} dB" for name, key in known if (base := number(metrics, key)) is not None)
    return Card("Reconstruction, test PSNR", f"{value:.1f}", "dB", beside)


def _top1(metrics: dict[str, Any]) -> Card | None:
    value = number(metrics, "top1_test")
    if value is None:
        return None
    error = number(metrics, "ece")
    beside = () if error is None else (f"calibration error {show(error, 'share')}",)
    return Card("Classification, test top-1", f"{100 * value:.1f}", "%", beside)


def _distances(metrics: dict[str, Any]) -> list[Card]:
    """Return one card per feature space, and FID where it was measured."""
    found = []
    fid = number(metrics, "fid")
    if fid is not None:
        floor = number(metrics, "fid_reconstruction")
        beside: tuple[str, ...] = () if floor is None else (f"reconstructions (floor) {show(floor)}",)
        found.append(Card("Samples, FID", show(fid), "", beside))
    spaces = metrics.get("fd")
    for space in spaces if isinstance(spaces, dict) else ():
        value = number(metrics, "fd", space)
        if value is None:
            continue
        floor, ceiling = number(metrics, "fd_reconstruction", space), number(metrics, "fd_noise", space)
        tests = number(metrics, "fd_test", space)
        named = (("reconstructions (floor)", floor), ("test images", tests), ("noise (ceiling)", ceiling))
        beside = tuple(f"{name} {show(bound)}" for name, bound in named if bound is not None)
        share = None
        if floor is not None and ceiling is not None and ceiling > floor:
            share = min(1.0, max(0.0, (value - floor) / (ceiling - floor)))
        found.append(
            Card(f"Samples, Fr\u00e9chet distance, {SPACES.get(space, space)}", show(value), "", beside, share)
        )
    return found


def _latent(data: ReportData) -> Card | None:
    """The latent's size, and what it takes to store it."""
    shape, bits = shape_of(data), number(data.metrics, "bits_per_dim")
    if shape is None and bits is None:
        return None
    beside = [] if shape is None else [f"for {shape.values:,} values of an image"]
    beside += [] if bits is None else [f"{bits:.2f} bits a number as stored"]
    allowed = data.config.get("encode", {})
    for key in ("quantization", "bits"):
        allowed = allowed.get(key) if isinstance(allowed, dict) else None
    if isinstance(allowed, int):
        beside.append("stored as float32" if allowed == 32 else f"quantised to {allowed} bits")
    rows = number(data.metrics, "rows")
    if rows is not None:
        beside.append(f"{show(rows, 'count')} latents")
    value, unit = ("", "") if shape is None else (shape.latent_words, f"= {shape.numbers:,} numbers")
    return Card("Latent of an image", value, unit, tuple(beside))


def _rates(metrics: dict[str, Any]) -> Card | None:
    encode, train = number(metrics, "encode_images_per_s"), number(metrics, "meta_images_per_s")
    beside = () if train is None else (f"meta-training {show(train, 'rate')}",)
    if encode is None:
        return None if train is None else Card("Speed, meta-training", show(train), "images/s")
    return Card("Speed, encoding", show(encode), "images/s", beside)
