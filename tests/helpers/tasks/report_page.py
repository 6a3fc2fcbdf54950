"""A report's data, complete and hostile, and a reader of the page that it becomes."""

import dataclasses
from html.parser import HTMLParser
from typing import Any

import numpy as np
from sklearn.datasets import load_digits

from functa.tasks.report.blocks import ReportData
from functa.tasks.report.files import page_files
from functa.tasks.report.page import write_report
from functa.tasks.report.pixels import Pixels
from functa.tasks.report.sections import report_sections

HOSTILE = '"><script src="http://evil.example/x.js">alert(1)</script><img src=x onerror=alert(1)>\' {{ 7*7 }} $\\frac'


VOID = {"meta", "img", "br", "link", "input", "hr"}


METRICS: dict[str, Any] = {
    "psnr_test": 30.84, "psnr_test_pooled": 29.92, "psnr_pca_patch": 18.8, "psnr_pca_image": 26.4,
    "psnr_by_bits": {"32": 31.2, "8": 31.1, "6": 29.4}, "mae_255": 5.3, "top1_test": 0.973, "ece": 0.012,
    "fd": {"classifier": 14.0, "latent": 0.8}, "fd_reconstruction": {"classifier": 2.0, "latent": 0.1},
    "fd_noise": {"classifier": 122.0, "latent": 9.0}, "locality": 1.0, "distinct": {"0": 88}, "bits_per_dim": 7.31,
    "rows": 1797, "bad_inputs": 1, "encode_images_per_s": 5123.4, "meta_images_per_s": 4000.0,
    "seconds_by_stage": {"meta_train": 61.3}, "parameters": {"field": 70529}, "fingerprint": "9f2c1b7a",
    "versions": {"torch": "2.11.0"}, "fd_counts": {"samples": 1000}, "something_new": [1, 2],
}  # fmt: skip


GENERATED: dict[str, Any] = METRICS | {
    "fd": {"classifier": 14.0}, "kd": {"classifier": -0.001, "latent": 0.2}, "duplicates": 3,
    "precision": {"classifier": 0.5, "latent": 0.25}, "recall": {"classifier": 0.75, "latent": 1.0},
    "fd_reference": {"images": "train", "count": 1497, "samples": 100, "dimensions": {"classifier": 64, "latent": 128},
                     "subset": {"classifier": 100, "latent": 100}},
}  # fmt: skip


class Page(HTMLParser):
    """Reads a page; fails where a tag is closed that was not open, keeps what a test asks for."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes what is not open"

    def handle_data(self, data: str) -> None:
        self.text += data

    def attributes(self, *names: str) -> list[str]:
        return [value or "" for _, attributes in self.tags for name, value in attributes.items() if name in names]


def page_of(data: ReportData) -> str:
    """Write the report of this data."""
    return write_report(data, report_sections(data))


def files_of(data: ReportData) -> dict[str, bytes]:
    """Draw the files of this data's report."""
    return page_files(report_sections(data))


def digit_pictures() -> tuple[Pixels, Pixels]:
    """Make originals and reconstructions, [10, 8, 8, 1]."""
    originals = (load_digits().images[:10] / 16 * 255).astype(np.uint8)[..., None]
    noise = np.random.default_rng(0).normal(0, 8, originals.shape)
    return originals, np.clip(originals + noise, 0, 255).astype(np.uint8)


def full_data() -> ReportData:
    """Make data of every part of the report."""
    originals, reconstructions = digit_pictures()
    steps = range(20, 2000, 20)
    return ReportData(
        title="digits",
        config={"name": "digits", "seed": 0, "encode": {"quantization": {"bits": 8}}, "images": {"location": ""}},
        metrics=METRICS,
        curves={
            "meta_train": [
                {"step": s, "loss": 1 / s, "psnr": 20 + s / 200, "learning_rate": 1e-3, "seconds": s / 9} for s in steps
            ],
            "train_classifier": [
                {"step": 20, "loss": 1.2, "accuracy": 0.4},
                {"step": 40, "loss": 0.2, "accuracy": 0.9},
            ],
        },
        originals=originals,
        reconstructions=reconstructions,
        samples=originals[:5],
        sample_labels=[str(n) for n in range(5)],
        psnr_per_image=np.random.default_rng(1).normal(30, 2, 300),
        lineage=[{"what": "field", "digest": "0f1e2d3c", "made_from": ["a1b2"], "when": "now", "where": "here"}],
        bad_inputs=[{"key": "train/cat/broken.png", "reason": "cannot identify image file"}],
        stages=[{"stage": "meta_train", "state": "done", "seconds": 61.3}, {"stage": "encode", "state": "reused"}],
        created="2026-02-03T10:03:10Z",
        versions={"torch": "2.11.0"},
        command="functa run digits",
    )


def hostile(full: ReportData) -> ReportData:
    """Replace every name by one that would do harm if it were markup."""
    name = HOSTILE + "\x00\u202e\udcff"
    return dataclasses.replace(
        full, title=name, config={name: {name: name}}, metrics=METRICS | {name: {name: name}, "fingerprint": name},
        curves={name: [{"step": 1, "loss": 2.0, "loss" + name: 1.0}, {"step": 2, "loss": 1.0, "loss" + name: 3.0}]},
        sample_labels=[name] * 5, lineage=[{"what": name, name: name}], bad_inputs=[{"key": name, "reason": name}],
        stages=[{"stage": name, "state": name, "seconds": 1.0}], created=name, versions={name: name}, command=name,
    )  # fmt: skip


def classified(full: ReportData, names: list[str], empty: int | None = None) -> ReportData:
    """Add a classifier's figures: class k is taken for the next one in a tenth of its images."""
    classes = len(names)
    confusion = np.diag(np.full(classes, 90)) + np.roll(np.diag(np.full(classes, 10)), 1, axis=1)
    if empty is not None:
        confusion[empty] = 0
    count = np.array([0, 0, *range(1, 14)])
    share = np.linspace(0, 1, 15)
    arrays = {"confusion": confusion, "bin_count": count, "bin_confidence": share, "bin_accuracy": share**2}
    return dataclasses.replace(full, classes=names, arrays={"classification": arrays})
