"""The command line of a report: it makes the same config again."""

import shlex

import pytest

from functa.flows.config.command import command_line
from functa.flows.config.load import load_config


@pytest.mark.parametrize(
    "settings",
    [
        [], ["field.width=32", "classifier=null"], ["evaluation.quick=true"],
        ["evaluation.bits=[8]", "images.limit=40"], ["evaluation.fid.weights=/a b/w.pth", "encode.quantization.bits=6"],
    ],
)  # fmt: skip
def test_the_command_makes_the_same_config(settings: list[str]) -> None:
    config = load_config("digits", settings)
    words = shlex.split(command_line(config, "./my root", "/other"))
    assert words[:3] == ["functa", "run", "digits"] and words[-4:] == ["--root", "./my root", "--from", "/other"]
    again = [words[index + 1] for index, word in enumerate(words) if word == "--set"]
    assert load_config("digits", again) == config
    assert len(again) == len(settings)


def test_a_config_of_a_users_own_file_has_no_short_command() -> None:
    assert command_line(load_config("digits", ["name=mine"]), "root") == ""
