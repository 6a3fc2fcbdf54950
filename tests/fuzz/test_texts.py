"""Curves, metrics and YAML presets, changed at random: read, or named in one error class; no bomb takes memory."""

import json
import resource
import time
from contextlib import suppress
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from functa.flows.config.load import load_config
from functa.flows.config.schema import ConfigError
from functa.storage.errors import StorageError
from functa.storage.places.address import open_location
from functa.storage.runs.curve import read_curve
from functa.tasks.report.blocks import ReportData
from functa.tasks.report.compare.runs import compare_runs, read_runs
from functa.tasks.report.sections import training
from tests.fuzz.test_records import drawn, replaced
from tests.helpers.fuzzing import HOSTILE, changed, examples, mutated
from tests.helpers.old_root import extract_old_root
from tests.helpers.preset_text import preset_text

pytestmark = [pytest.mark.attacks, pytest.mark.fuzz]

ROWS = [{"step": 1, "steps": 2, "loss": 0.5, "images_per_s": 3.0}, {"step": 2, "steps": 2, "loss": 0.25, "psnr": 20.0}]


def test_changed_curves_cost_points_and_nothing_else(tmp_path: Path) -> None:
    whole = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    one = st.one_of(changed(ROWS).map(_line), mutated([whole]))

    @examples(8)
    @given(st.lists(one, min_size=1, max_size=4))
    def check(lines: list[bytes]) -> None:
        (tmp_path / "metrics.jsonl").write_bytes(whole + b"\n".join(lines))
        rows = read_curve(open_location(str(tmp_path)))
        training.section(ReportData("x", curves={"meta_train": rows}))

    check()


def _line(row: object) -> bytes:
    try:
        return json.dumps(row).encode()
    except (RecursionError, ValueError):
        return b"[" * 5000


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return extract_old_root(tmp_path_factory.mktemp("old")) / "root"


@pytest.mark.parametrize("name", ["metrics.json", "run.json"])
def test_changed_metrics_are_compared_or_named(root: Path, name: str) -> None:
    path = root / name if name == "metrics.json" else next(root.glob("runs/*/run.json"))

    @examples(10)
    @given(drawn(path, lambda value: value))
    def check(data: bytes) -> None:
        replaced(path, data, lambda: compare_runs(read_runs([str(root), str(root)])).as_json(), StorageError)

    check()


def as_yaml(value: object) -> str:
    with suppress(Exception):
        return yaml.safe_dump(value)
    return "a: " + "[" * 5000


def test_changed_presets_are_configs_or_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    texts = [preset_text(name) for name in ("digits", "cifar10_quick")]
    documents = [yaml.safe_load(text) for text in texts]
    bytes_of = mutated([text.encode() for text in texts])

    @examples(8)
    @given(st.one_of(changed(documents).map(lambda value: as_yaml(value).encode(errors="replace")), bytes_of))
    def check(data: bytes) -> None:
        path.write_bytes(data)
        with suppress(ConfigError):
            load_config(str(path))

    check()


BOMBS = {
    "aliases": "\n".join(
        ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
        + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    ),
    "merged aliases": "\n".join(
        ["a0: &a0 {k0: x}"] + [f"a{n}: &a{n} {{k{n}: [{', '.join([f'*a{n - 1}'] * 9)}]}}" for n in range(1, 12)]
    ),
    "aliases of a setting": "name: &n {a: 1}\nfield: &f [*n, *n]\nprovenance: {x: [*f, *f]}\n",
    "itself": "field: &f\n  width: *f\n",
    "a tag": "field: !!python/object/apply:os.system ['echo harm']\n",
    "depth": "field: " + "[" * 100_000,
    "mappings": "field: " + "{a: " * 20_000,
    "a number": "seed: " + "9" * 100_000,
    "a float": "seed: .nan\nfield: {w0: .inf}\n",
    "a date": "seed: 2024-99-99\n",
    "many keys": "\n".join(f"k{n}: 1" for n in range(15_000)),
    "one key often": "\n".join("a: 1" for _ in range(15_000)),
    "binary": "field: !!binary AAAA\n",
    "a set": "field: !!set {a, b}\n",
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_yaml_bombs_are_refused_in_one_line_without_taking_memory_or_time(tmp_path: Path, bomb: str) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(BOMBS[bomb])
    begun, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ConfigError) as error:
        load_config(str(path))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 << 10  # KiB
    assert time.process_time() - begun < 30
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 5000


def test_changed_overrides_are_configs_or_refused_in_one_line() -> None:
    keys = ["seed", "field.width", "images.location", "inner.rates_clip", "encode.quantization.margin", "gate", "x.y"]
    values = st.one_of(st.sampled_from([str(value) for value in HOSTILE]), st.text(max_size=40), st.just("[" * 5000))

    @examples(8)
    @given(st.sampled_from(keys), values)
    def check(key: str, value: str) -> None:
        with suppress(ConfigError):
            load_config("digits", [f"{key}={value}"])

    check()
