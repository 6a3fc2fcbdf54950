"""PipelineConfig: what is refused and with which message, and what a stage's digest depends on."""

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from functa.flows.config.consistency import latent_surplus
from functa.flows.config.digests import chain_digests, digest, inputs_of, require_stage, stage_config, stages_of
from functa.flows.config.load import load_config, recorded_config
from functa.flows.config.presets import preset_names
from functa.flows.config.schema import ConfigError
from functa.models.config import DiffusionConfig, FieldConfig
from functa.storage.runs.stage_records import StageRecord
from functa.tasks.config import TrainClassifierConfig, TrainDiffusionConfig
from functa.tasks.stage_table import STAGES

SHOWN = "evaluation.perturbation.show_channel"
EDM, HEUN = "diffusion.process.kind=edm", "diffusion.process.sampler=heun"


@pytest.mark.parametrize(
    ("preset", "overrides", "message"),
    [
        ("digitz", [], "unknown preset 'digitz': did you mean 'digits'"),
        ("digits", ["field.widht=64"], "unknown key 'field.widht': did you mean 'field.width'"),
        ("digits", ["encode.quantisation.bits=6"], "did you mean 'encode.quantization'"),
        ("digits", ["field.width=0"], "field.width: input should be greater than or equal to 4, got 0"),
        ("digits", ["field.width=wide"], "field.width: "),
        ("digits", ["encode.quantization.bits=12"], "bits is 1 to 8, or 32 for float32, not 12"),
        ("digits", ["field=3"], "field: is a section of settings, so give a mapping of keys, got 3"),
        ("digits", ["name.x=3"], "'name' is a value, not a section"),
        ("digits", ["meta_train.learning_rate=.nan"], "learning_rate"),
        ("digits", ["nonsense"], "expected KEY=VALUE"),
        ("digits", ["diffusion.process.conditional=false", "diffusion.process.guidance=3"], "conditional"),
        ("digits", ["images.source=folder"], "location is empty"),
        ("digits", ["images.location=photographs"], "set images.source=folder too"),
        ("no_such.yaml", [], "no such file"),
        ("a" * 300 + ".yaml", [], "cannot be read (File name too long); name a readable YAML file"),
        ("digits", ["inner.compile=maybe"], "inner.compile: input should be 'auto', 'on' or 'off', got 'maybe'"),
        ("digits", ["field.width="], "field.width: input should be a valid integer"),
        ("digits", ["classifier=3"], "classifier: "),
        ("digits", ["classifier.stepz=3"], "unknown key 'classifier.stepz': did you mean 'classifier.steps'?"),
        ("digits", ["resolution=64"], "unknown key 'resolution': did you mean 'images.resolution'?"),
        ("digits", ["steps=5"], "did you mean one of inner.steps, meta_train.steps, encode.steps"),
        ("digits", ["images.location=a", "images.foo=3"], "unknown key 'images.foo'; known: source, "),
        ("digits", ["classifier=on"], "classifier: is a section of settings, so give null or a mapping of keys, got"),
        ("digits", ["field.spatial=3"], "8x8 pixels are not divisible into 3x3 latent positions: choose field.spatial"),
        ("cifar10_quick", ["images.resolution=36"], "36x36 pixels are not divisible into 8x8 latent positions"),
        ("digits", ["images.resolution=12", "field.coordinates=binary"], "powers of two, not 12: choose another"),
        ("digits", ["field.axes=3"], "field.axes=3: the pipeline works on images, which have 2 axes; set field.axes=2"),
        (
            "digits",
            ["meta_train.patches_per_image=2", "field.interpolation=bilinear"],
            "patches_per_image=2 needs patches that depend on their own latent alone: leave it empty",
        ),
        ("digits", ["meta_train.patches_per_image=2", "field.kernel=3"], "nearest, field.kernel=1 and"),
        ("digits", ["meta_train.patches_per_image=5"], "=5 exceeds the 4 latent positions of an image: choose at most"),
        *(
            (
                "digits",
                ["dispatch.runner=dask", f"dispatch.address={address}"],
                "only tls:// addresses are connected to",
            )
            for address in ("tcp://10.0.0.1:8786", "tcp://localhost.evil.example:1", "ucx://a:1")
        ),
        ("digits", ["meta_train.muon_factor=2"], "has no effect with meta_train.optimizer=adam; set "),
        ("digits", ["classifier.muon_factor=2"], "has no effect with classifier.optimizer=adam; set "),
        ("digits", ["meta_train.micro_batch=65"], "meta_train.micro_batch=65 exceeds meta_train.batch=64: choose at"),
        ("digits", ["classifier.micro_batch=129"], "classifier.micro_batch=129 exceeds classifier.batch=128: choose"),
        ("digits", ["diffusion.micro_batch=129"], "diffusion.micro_batch=129 exceeds diffusion.batch=128: choose at"),
        *(
            (
                "digits",
                ["dispatch.devices=8", f"{section}.batch=7"],
                f"{section}.batch=7 cannot be split over dispatch.devices=8: choose at least 8, or lower dispatch",
            )
            for section in ("meta_train", "classifier", "diffusion", "evaluation.pixel_classifier")
        ),
        (
            "digits",
            [EDM],
            "sampler=ddpm does not fit kind=edm: set diffusion.process.sampler=heun and sampling_steps=18",
        ),
        ("digits", [HEUN], "sampler=heun does not fit kind=ddpm: set diffusion.process.sampler=ddpm or dpmpp"),
        ("digits", [EDM, HEUN, "diffusion.process.timestep_ratio=3"], "timestep_ratio=3.0 means nothing to kind=edm"),
        ("digits", [EDM, HEUN, "diffusion.process.schedule=linear"], "schedule=linear means nothing to kind=edm"),
        ("digits", ["diffusion.process.sigma_data=2"], "sigma_data=2.0 means nothing to kind=ddpm: leave it at 1.0"),
        ("digits", [EDM, HEUN, "diffusion.normalization={kind: fixed, factor: 3}"], "factor=3 does not give: set "),
        ("digits", [f"{SHOWN}=8"], "show_channel=8: a latent has channels 0 to 7; choose one of"),
        ("digits", [f"{SHOWN}=0", "field.spatial=1"], "show_channel=0 is for spatial latents: a vector has entries"),
        ("digits", ["provenance.paper=[field.widht]"], "provenance names 'field.widht', which is no key"),
        ("digits", ["provenance.paper=[seed, seed]"], "provenance names 'seed' twice"),
    ],
)
def test_a_wrong_config_is_one_line_that_names_the_key(preset: str, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(preset, overrides)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.attacks
@pytest.mark.parametrize(
    "text",
    [
        "- a\n- b\n",
        "a: [1\n",
        "!!python/object/apply:os.system ['true']\n",
        "inner: {compile: !!python/object/apply:os.system ['true']}\n",
        "inner: {compile: !!python/name:os.system ''}\n",
        "\x00",
        "a: &a [*a]\n",
        "field: &a {field: *a}\n",
        "images: &a\n  location: *a\n",
        "seed: 2024-13-45\n",
        "--- {}\n--- {}\n",
        "",
    ],
)
def test_a_hostile_preset_is_refused_in_one_line(text: str, tmp_path) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "hostile.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(str(path))
    assert "\n" not in str(caught.value)


def refusal(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(str(path))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_preset_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    folder, latin, faulty = tmp_path / "folder.yaml", tmp_path / "latin.yaml", tmp_path / "faulty.yaml"
    folder.mkdir()
    assert "folder.yaml: is a folder" in refusal(folder)
    latin.write_bytes("name: café\n".encode("latin-1"))
    assert "latin.yaml: not UTF-8 text" in refusal(latin)
    if Path("/proc/self/mem").exists():  # a file whose first byte the kernel refuses to read, to root too
        faulty.symlink_to("/proc/self/mem")
        assert "faulty.yaml: cannot be read (Input/output error)" in refusal(faulty)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_preset_without_permission_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\n")
    path.chmod(0)
    assert "cannot be read (Permission denied)" in refusal(path)


def chosen(*overrides: str) -> dict[str, Any]:
    """Return the values of the keys that the overrides name."""
    placed = any(override.startswith("images.location=") and override[-1] != "=" for override in overrides)
    located = ["images.source=folder"] if placed else []
    config = load_config("digits", [*located, *overrides]).model_dump(mode="json")
    values = {}
    for override in overrides:
        key = override.partition("=")[0]
        value: Any = config
        for part in key.split("."):
            value = value[part]
        values[key] = value
    return values


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("inner.compile=on", "on"),
        ("inner.compile=off", "off"),
        ("images.location=2024", "2024"),
        ("images.location=007", "007"),
        ("images.location=/data/a: b #1", "/data/a: b #1"),
        ("images.location=null", "null"),
        ("images.location=", ""),
        ("name=1e3", "1e3"),
        ("images.classes=", None),
        ("images.channels=none", None),
        ("images.channels=3", 3),
        ("inner.rates_clip=", None),
        ("inner.rates_clip=[0, 1]", [0.0, 1.0]),
        ("diffusion.process.clip=", None),
        ("diffusion.process.clip=null", None),
        ("diffusion.process.clip=4", 4.0),
        ("diffusion.process.conditional=off", False),
        ("diffusion.process.conditional=on", True),
        ("meta_train.steps=1e3", 1000),
    ],
)
def test_an_override_is_read_as_the_type_of_its_field(override: str, value: Any) -> None:
    assert list(chosen(override).values()) == [value]


def test_a_section_may_be_overridden_whole() -> None:
    config = load_config("digits", ["inner={compile: on, steps: 2}"])
    assert (config.inner.compile, config.inner.steps) == ("on", 2)


@pytest.mark.parametrize("text", ["null", "", "~", "None", "off", "false", "no"])
def test_a_null_section_has_no_stage(text: str) -> None:
    config = load_config("digits", [f"classifier={text}"])
    assert config.classifier is None
    assert stages_of(config) == ("meta_train", "encode", "train_diffusion", "evaluate")
    assert inputs_of(config, "evaluate") == ("meta_train", "encode", "train_diffusion")
    with pytest.raises(ConfigError, match=r"digits: has no train-classifier stage.*--set classifier=\{\}"):
        require_stage(config, "train_classifier")
    assert stage_config(config, "encode") == stage_config(load_config("digits"), "encode")


def test_a_key_of_a_null_section_asks_for_the_section_with_defaults(tmp_path: Path) -> None:
    path = tmp_path / "bare.yaml"
    path.write_text("classifier: null\ndiffusion:\n")
    assert (load_config(str(path)).classifier, load_config(str(path)).diffusion) == (None, None)
    classifier = load_config(str(path), ["classifier.steps=5"]).classifier
    assert classifier == TrainClassifierConfig(steps=5)
    assert load_config(str(path), ["classifier={}"]).classifier == TrainClassifierConfig()
    assert load_config(str(path), ["diffusion.process.clip=none"]).diffusion == TrainDiffusionConfig()


def test_a_null_diffusion_section_survives_json_and_digests() -> None:
    config = load_config("digits", ["diffusion=null", "classifier=null"])
    assert type(config).model_validate_json(config.model_dump_json()) == config
    assert not [key for key in stage_config(config, "evaluate") if key.startswith("diffusion.")]


def test_an_overridden_key_is_neither_the_papers_nor_assumed(tmp_path: Path) -> None:
    path = tmp_path / "marked.yaml"
    path.write_text(
        "field: {width: 32, depth: 3}\nclassifier: null\n"
        "provenance: {paper: [field.width, field.depth], assumed: [classifier]}\n"
    )
    assert load_config(str(path), ["field.width=64"]).provenance.paper == ("field.depth",)
    assert load_config(str(path), ["field={width: 64}"]).provenance.paper == ()
    assert load_config(str(path), ["classifier.steps=5"]).provenance.assumed == ()
    marks = load_config(str(path), ["field.w0=3"]).provenance
    assert marks == load_config(str(path)).provenance
    assert [marks.of(key) for key in ("field.width", "field.w0", "classifier.steps")] == ["paper", "", "assumed"]


def test_a_latent_larger_than_its_image_is_a_warning_with_both_numbers() -> None:
    field = FieldConfig(spatial=8, channels=49)
    warning = latent_surplus(field, 32, 3)
    assert warning is not None
    assert "8x8x49 has 3136 numbers, more than the 3072 values of a 32x32x3 image" in warning
    assert latent_surplus(field.model_copy(update={"channels": 48}), 32, 3) is None
    assert latent_surplus(field, None, 3) is None


def test_a_file_needs_no_quotes_around_words_that_yaml_takes_for_something_else(tmp_path: Path) -> None:
    path = tmp_path / "plain.yaml"
    path.write_text(
        "name: 2024\ninner: {compile: off}\nimages:\n  source: folder\n  location: 007\n  classes:\n"
        "diffusion: {process: {conditional: yes, clip: null}}\n"
    )
    config = load_config(str(path))
    assert (config.name, config.inner.compile, config.images.location) == ("2024", "off", "007")
    assert config.images.classes is None
    assert config.diffusion.process.conditional
    assert config.diffusion.process.clip is None


def test_only_batches_that_are_trained_on_are_split_over_devices() -> None:
    load_config("digits", ["dispatch.devices=8", "meta_train.batch=8"])
    load_config("digits", ["dispatch.devices=8", "diffusion=null", "evaluation.pixel_classifier.batch=7"])


@given(st.text(min_size=1))
def test_any_text_is_a_location(text: str) -> None:
    assert load_config("digits", ["images.source=folder", f"images.location={text}"]).images.location == text


def test_own_images_may_have_any_number_of_classes() -> None:
    assert all(load_config(name).images.classes is None for name in preset_names())


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


def test_how_images_are_split_is_part_of_a_digest_only_where_it_decides() -> None:
    """Roots of older versions have no such key: their images were split as "stratified" does."""
    folder = ["images.source=folder", "images.location=x", "images.channels=1"]
    assert stage_config(load_config("digits", folder), "encode")["images.split"] == "by_key"
    assert "images.split" not in stage_config(load_config("digits", [*folder, "images.split=stratified"]), "encode")
    assert "images.split" not in stage_config(load_config("digits"), "encode")


def test_how_work_is_done_touches_no_digest() -> None:
    assert changed("dispatch.workers=4", "meta_train.log_every=3", "encode.batch=7", "inner.compile=auto") == set()


@given(st.dictionaries(st.text(), st.integers() | st.text() | st.lists(st.booleans())))
def test_a_digest_does_not_depend_on_key_order(value: dict) -> None:  # type: ignore[type-arg]
    assert digest(value) == digest(dict(reversed(value.items())))


def test_set_takes_the_keys_without_middle_sections_that_over_takes() -> None:
    for short, full in (
        ("diffusion.timestep_ratio=3", "diffusion.process.timestep_ratio=3"),
        ("classifier.dropout=0.2", "classifier.model.dropout=0.2"),
        ("encode.bits=6", "encode.quantization.bits=6"),
        ("evaluation.show_channel=2", f"{SHOWN}=2"),
    ):
        assert load_config("digits", [short]) == load_config("digits", [full]) != load_config("digits")
    with pytest.raises(ConfigError, match=r"unknown key 'classifier\.kind': did you mean"):
        load_config("digits", ["classifier.kind=mlp"])  # the model's or the normalisation's


def test_a_number_of_channels_is_another_evaluation_than_the_default_of_earlier_versions() -> None:
    key = "evaluation.perturbation.channels"
    default, given_number = (stage_config(load_config("digits", more), "evaluate")[key] for more in ([], [f"{key}=64"]))
    assert (default, given_number) == (64, "64")
    record = StageRecord(
        stage="evaluate", state="finished", config={}, inputs={}, output="runs/1", started="",
        pipeline=load_config("digits").model_dump(mode="json"),
    )  # fmt: skip
    earlier = record.pipeline["evaluation"]["perturbation"]
    earlier["channels"] = 64
    del earlier["show_channel"]
    assert recorded_config(record) == load_config("digits")
    earlier["show_channel"] = None
    assert recorded_config(record) == load_config("digits", [f"{key}=64"])


def test_the_spread_of_normalised_latents_goes_with_gamma_and_samplers_with_their_process() -> None:
    def process(*overrides: str) -> DiffusionConfig:
        diffusion = load_config("digits", [f"diffusion.{each}" for each in overrides]).diffusion
        assert diffusion is not None
        return diffusion.process

    edm = process("process={kind: edm}", "normalization.gamma=2")
    assert (edm.sigma_data, edm.sampler, edm.sampling_steps, edm.calls) == (0.5, "heun", 18, 35)
    assert process("process={kind: edm, sigma_data: 3}", "normalization.gamma=2").sigma_data == 3
    assert process("process={kind: edm, sigma_data: 3}", "normalization={kind: fixed, factor: 0.1}").sigma_data == 3
    assert process("process={kind: flow, sampling_steps: 5}").calls == 9
    assert process("process={}").calls == 1000


def test_a_kind_of_process_is_part_of_the_trained_model_and_its_steps_are_not() -> None:
    edm = ["diffusion.process={kind: edm}"]
    one, longer, flow = (chain_digests(load_config("digits", more)) for more in (
        edm, [*edm, "diffusion.process.sampling_steps=9"], ["diffusion.process={kind: flow}"]))  # fmt: skip
    assert one["train_diffusion"] == longer["train_diffusion"] != flow["train_diffusion"]
    assert one["evaluate"] != longer["evaluate"]
