"""PipelineConfig: what is refused, how it is told, and what a stage's digest depends on."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flows.config import STAGES, ConfigError, digest, load_config, preset_names, stage_config


@pytest.mark.parametrize(
    ("preset", "overrides", "told"),
    [
        ("digitz", [], "unknown preset 'digitz': did you mean 'digits'"),
        ("digits", ["field.widht=64"], "unknown key 'field.widht': did you mean 'width'"),
        ("digits", ["encode.quantisation.bits=6"], "did you mean 'quantization'"),
        ("digits", ["field.width=0"], "field.width: input should be greater than or equal to 4, got 0"),
        ("digits", ["field.width=wide"], "field.width: "),
        ("digits", ["encode.quantization.bits=12"], "bits is 1 to 8, or 32 for float32, not 12"),
        ("digits", ["field=3"], "field: "),
        ("digits", ["name.x=3"], "'name' is a value, not a section"),
        ("digits", ["meta_train.learning_rate=.nan"], "learning_rate"),
        ("digits", ["nonsense"], "expected KEY=VALUE"),
        ("digits", ["diffusion.process.conditional=false", "diffusion.process.guidance=3"], "conditional"),
        ("digits", ["images.source=folder"], "location is empty"),
        ("no_such.yaml", [], "no such file"),
    ],
)
def test_a_wrong_config_is_one_line_that_names_the_key(preset: str, overrides: list[str], told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(preset, overrides)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text", ["- a\n- b\n", "a: [1\n", "!!python/object/apply:os.system ['true']\n", "\x00", "a: &a [*a]\n"]
)
def test_a_hostile_preset_is_refused_in_one_line(text: str, tmp_path) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "hostile.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_loads_and_survives_json(name: str) -> None:
    config = load_config(name)
    assert type(config).model_validate_json(config.model_dump_json()) == config


def test_a_number_with_an_exponent_and_no_dot_is_a_number() -> None:
    assert load_config("digits", ["meta_train.learning_rate=1e-3"]).meta_train.learning_rate == 1e-3


def digests(*overrides: str) -> dict[str, str]:
    config = load_config("digits", list(overrides))
    return {stage: digest(stage_config(config, stage)) for stage in STAGES}


def changed(*overrides: str) -> set[str]:
    before, after = digests(), digests(*overrides)
    return {stage for stage in STAGES if before[stage] != after[stage]}


def test_a_key_touches_the_stages_that_read_it_and_no_others() -> None:
    assert changed("classifier.steps=70") == {"train_classifier"}
    assert changed("encode.quantization.bits=6") == {"encode"}
    assert changed("field.width=32") == {"meta_train", "encode"}
    assert changed("diffusion.process.guidance=2") == {"evaluate"}
    assert changed("diffusion.process.schedule=linear") == {"train_diffusion"}


def test_how_work_is_done_touches_no_digest() -> None:
    assert changed("dispatch.workers=4", "meta_train.log_every=3", "encode.batch=7", "inner.compile=auto") == set()


@given(st.dictionaries(st.text(), st.integers() | st.text() | st.lists(st.booleans())))
def test_a_digest_does_not_depend_on_key_order(value: dict) -> None:  # type: ignore[type-arg]
    assert digest(value) == digest(dict(reversed(value.items())))
