"""The commands of the paper's figures of latents: what they make on a small root is what the page promises."""

import re
import shlex
from itertools import pairwise
from pathlib import Path

import pytest

from functa.flows.config.load import load_config
from functa.flows.sweep.plan import plan_sweep
from functa.tasks.evaluation import compression, perturbation
from functa.tasks.evaluation.evaluator_input import EvaluationJob, read_arrays
from tests.helpers.docs.pages import DOCS
from tests.helpers.flows.tiny_config import TINY
from tests.tasks.evaluation.generation.test_memorization import field_of, work

# The presets' sizes of latents with a small field of two steps, on digits.
SMALL = [*TINY, "images.limit=40", "meta_train.steps=2", "field.width=8", "field.depth=2", "diffusion=null"]
FIGURES = {
    "Fig. 4": ("paper_cifar10_vector_1024", ["field.spatial=1", "field.channels=1024"]),
    "Fig. 11": ("paper_imagenet_32x32x64", ["field.spatial=2", "field.channels=8"]),
    "Fig. 12": ("paper_imagenet_32x32x64", ["field.spatial=2", "field.channels=64"]),
    "Fig. 13": ("paper_imagenet_32x32x64", ["field.spatial=2", "field.channels=64"]),
}


def row(figure: str) -> str:
    (found,) = re.findall(rf"^\| {re.escape(figure)}: .*$", (DOCS / "how-to/reproduce.md").read_text(), re.MULTILINE)
    return str(found)


def prepared(figure: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, EvaluationJob]:
    """Return the row of the page, and the job of its command's evaluators on a small root."""
    monkeypatch.setattr(perturbation, "PIXELS", 1 << 10)  # as if images were large
    preset, field = FIGURES[figure]
    line = row(figure)
    (command,) = re.findall(rf"`(functa run {preset} [^`]*)`", line)
    words = shlex.split(command)
    asked = [word for before, word in pairwise(words) if before == "--set"]
    section = load_config(preset, asked).evaluation.perturbation
    assert section is not None
    settings = [*SMALL, *field, *(each for each in asked if each.startswith("evaluation."))]
    small = load_config("digits", settings).evaluation.perturbation
    assert small is not None and (section.channels, section.show_channel) == (small.channels, small.show_channel)
    return line, work(field_of(folder / "field", *settings), folder, *settings)


def number(text: str) -> int:
    return int(text.replace(",", ""))


def test_figure_4_tries_all_entries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line, job = prepared("Fig. 4", tmp_path, monkeypatch)
    perturbation.measure(job)
    entries = read_arrays(job.output, "perturbation")["entries"]
    (stated,) = re.findall(r"all ([0-9,]+) entries are tried", line)
    assert entries.tolist() == list(range(number(stated)))


def test_figure_12_shows_the_papers_channel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line, job = prepared("Fig. 12", tmp_path, monkeypatch)
    perturbation.measure(job)
    (stated,) = re.findall(r"the (\d+)th \|", line)
    assert int(read_arrays(job.output, "perturbation")["shown"]) == number(stated) - 1  # the paper counts from 1


def test_figure_13_has_all_channels_at_every_strength(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line, job = prepared("Fig. 13", tmp_path, monkeypatch)
    perturbation.measure(job)
    (stated,) = re.findall(r"(\d+) channels", line)
    arrays = read_arrays(job.output, "perturbation")
    assert arrays["channels"].tolist() == list(range(number(stated)))
    assert arrays["rmse"].shape == (number(stated), 6)


def test_figure_11_has_every_number_of_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line, job = prepared("Fig. 11", tmp_path, monkeypatch)
    high, low = map(int, re.findall(r"bits, (\d) to (\d)", line)[0])
    assert load_config("paper_imagenet_32x32x64").encode.quantization.range == "auto"
    assert compression.measure(job)["psnr_by_bits"].keys() == {"32", *map(str, range(low, high + 1))}


def test_table_8_encodes_once() -> None:
    """That its sweep does so is in tests/flows/sweep/test_flow.py."""
    line = row("Table 8")
    words = shlex.split(re.findall(r"`functa sweep ([^`]*)`", line)[0])
    options = dict(zip(words[1::2], words[2::2], strict=True))
    plan = plan_sweep(words[0], [], [options["--over"]], None, int(options["--seeds"]))
    assert "images are encoded once" in line
    assert len({member.digests["encode"] for member in plan.members}) == 4
    assert len({member.digests["encode"] for member in plan.members if plan.float_member(member) is None}) == 1
