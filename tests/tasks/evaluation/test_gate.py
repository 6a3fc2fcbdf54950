"""The quality gate: which thresholds are missed."""

import math
from typing import Any

import pytest

from functa.tasks.evaluation.gate import verdicts


@pytest.mark.parametrize(
    ("gate", "metrics", "expected"),
    [
        ({"min_psnr": 25}, {"psnr_test": 21.3}, ["psnr_test 21.3 dB is below gate.min_psnr 25 dB"]),
        ({"min_psnr": 25}, {"psnr_test": 25.0}, []),
        ({"min_psnr": 25}, {"psnr_test": 24.99999}, ["psnr_test 24.99999 dB is below gate.min_psnr 25 dB"]),
        ({"max_fd": 2}, {"fd": {"classifier": 2.5}}, ["fd.classifier 2.5 is above gate.max_fd 2"]),
        ({"min_psnr": 25}, {"psnr_test": 24.999999999}, ["psnr_test 24.999999999 dB is below gate.min_psnr 25 dB"]),
        ({"max_fd": 2}, {"fd": {"classifier": 2.0}}, []),
        ({"max_fd": 2}, {"fd": {"latent": 1}}, ["fd.classifier was not measured, but gate.max_fd 2 asks for it"]),
        ({"max_fid": 9}, {}, ["fid was not measured, but gate.max_fid 9 asks for it"]),
        (
            {"min_top1": 0.5},
            {"top1_test": math.nan},
            ["top1_test nan is no number, but gate.min_top1 0.5 asks for it"],
        ),
        ({"min_top1": 0.5, "max_ece": 0.1}, {"top1_test": 0.6, "ece": 0.2}, ["ece 0.2 is above gate.max_ece 0.1"]),
        ({"max_fid": 9}, {"fid": True}, ["fid was not measured, but gate.max_fid 9 asks for it"]),
        ({"max_fid": 9}, {"fid": 9}, []),
        ({"min_psnr": None}, {}, []),
        ({}, {}, []),
    ],
)
def test_the_gate_names_figure_and_threshold(
    gate: dict[str, Any], metrics: dict[str, Any], expected: list[str]
) -> None:
    assert [verdict.explain() for verdict in verdicts(gate, metrics) if not verdict.passed] == expected
