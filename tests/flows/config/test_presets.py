"""Preset files that extend others: what they inherit, what is refused."""

from pathlib import Path

import pytest

from functa.flows.config.digests import chain_digests
from functa.flows.config.load import load_config
from functa.flows.config.presets import preset_names, read_preset
from functa.flows.config.schema import ConfigError


def refusal(preset: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(str(preset))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_a_file_that_extends_a_preset_equals_the_preset_with_overrides(tmp_path: Path) -> None:
    text = "extends: digits\nfield: {width: 32}\nclassifier: off\nencode: {quantization: {bits: 6}}\n"
    extended = load_config(str(written(tmp_path / "mine.yaml", text)))
    overridden = load_config("digits", ["field.width=32", "classifier=null", "encode.quantization.bits=6"])
    assert extended.name == "mine"
    assert extended.model_copy(update={"name": "digits"}) == overridden
    assert chain_digests(extended) == chain_digests(overridden)


def test_files_extend_files_beside_them_and_the_last_one_counts(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    written(tmp_path / "base.yaml", "extends: digits\nfield: {width: 32, depth: 3}\ndiffusion: null\n")
    middle = written(tmp_path / "below" / "middle.yaml", "extends: ../base.yaml\nfield: {width: 16}\n")
    last = written(tmp_path / "last.yaml", "extends: below/middle.yaml\nname: own\ndiffusion: {steps: 7}\n")
    config = load_config(str(last), ["field.w0=5"])
    assert (config.name, config.field.width, config.field.depth, config.field.w0) == ("own", 16, 3, 5)
    assert config.diffusion is not None
    assert (config.diffusion.steps, config.diffusion.batch) == (7, 64)  # of a null section the rest are defaults
    assert load_config(str(middle)).diffusion is None


def test_a_setting_that_a_file_changes_loses_the_provenance_of_the_preset(tmp_path: Path) -> None:
    text = "extends: paper_cifar10_8x8x16\nfield: {width: 64, w0: 5}\n"
    marks = load_config(str(written(tmp_path / "mine.yaml", text))).provenance
    assert [marks.of(key) for key in ("field.width", "field.w0", "field.depth")] == ["", "", "paper"]
    text += "provenance: {assumed: [field.width]}\n"
    marks = load_config(str(written(tmp_path / "mine.yaml", text))).provenance
    assert [marks.of(key) for key in ("field.width", "field.w0", "inner.loss")] == ["assumed", "", "assumed"]


def test_files_that_extend_each_other_are_refused(tmp_path: Path) -> None:
    first = written(tmp_path / "first.yaml", "extends: second.yaml\n")
    written(tmp_path / "second.yaml", "extends: ./first.yaml\n")
    assert "extends itself (first.yaml -> second.yaml -> first.yaml)" in refusal(first)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("extends: digitz\n", "mine.yaml: extends unknown preset 'digitz': did you mean 'digits'?"),
        ("extends: none.yaml\n", "none.yaml: no such file; name a YAML file or a preset"),
        ("extends: [digits]\n", "mine.yaml: extends: expected the name of a preset or a YAML file, got ['digits']"),
        ("extends: digits\nfield: 3\n", "field: is a section of settings"),
        ("extends: digits\nimages: {source: {a: 1}}\n", "'source' is a section in one file and a value in the other"),
        ("extends: digits\nprovenance: {paper: [seed, seed]}\n", "provenance names 'seed' twice"),
        ("extends: digits\nfield: &a {field: *a}\n", "mine.yaml: a section contains itself"),
        ("preset: cifar10_quick\nimages: {location: x}\n", "unknown key 'preset': to start from a preset, write `ext"),
    ],
)
def test_a_file_that_cannot_extend_is_refused_in_one_line(text: str, line: str, tmp_path: Path) -> None:
    assert line in refusal(written(tmp_path / "mine.yaml", text))


def test_a_refused_preset_names_a_few_that_are_similar() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config("paper_cifar10")
    assert str(caught.value).count("'paper_cifar10_") <= 3
    assert "`functa presets` lists them" in str(caught.value)


def test_our_own_presets_come_first_and_each_has_a_purpose_and_a_time() -> None:
    names = preset_names()
    paper = [name.startswith("paper_") for name in names]
    assert paper == sorted(paper)
    assert [name for name in names if not all(read_preset(name)[1:])] == []
