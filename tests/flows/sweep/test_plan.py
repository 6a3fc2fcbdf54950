"""The plan of a sweep: members, what they share, and what is refused before anything starts."""

import contextlib
import io
import re
import shlex
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from functa.flows.cli.main import app, main
from functa.flows.config.digests import chain_digests, stage_config, stages_of
from functa.flows.config.load import load_config
from functa.flows.config.preflight import check_models
from functa.flows.config.schema import ConfigError
from functa.flows.ledger import MissingInput
from functa.flows.sweep.plan import number_of, plan_sweep, split_values
from functa.flows.sweep.shared import SharedRoots
from functa.tasks import report
from functa.tasks.report.compare.sweep import unknown_metric

NOTHING_LEARNS = ["--set", "classifier=null", "--set", "diffusion=null"]
PLAIN = st.text("ab01.-", min_size=1, max_size=3)
NESTED = st.recursive(
    PLAIN, lambda below: st.lists(below, min_size=1, max_size=2).map(lambda v: f"[{','.join(v)}]"), max_leaves=4
)


@given(st.lists(NESTED, min_size=1, max_size=4))
def test_values_are_parted_at_the_commas_outside_of_brackets(values: list[str]) -> None:
    assert split_values(",".join(values)) == values


def test_a_comma_in_quotes_or_braces_separates_nothing() -> None:
    assert split_values('"a,b",{x: 1, y: [2,3]}, c') == ['"a,b"', "{x: 1, y: [2,3]}", "c"]


@pytest.mark.parametrize("stage", ["meta_train", "encode", "train_classifier", "train_diffusion", "evaluate"])
def test_roots_made_before_there_was_a_training_seed_remain_up_to_date(stage: str) -> None:
    config = load_config("digits", ["seed=3"])
    assert not any("training_seed" in key or "gate" in key for key in stage_config(config, stage))
    assert stage_config(config, stage).get("seed", 3) == 3
    same = load_config("digits", ["seed=3", "training_seed=3"])
    assert stage_config(same, stage) == stage_config(config, stage)
    other = load_config("digits", ["seed=3", "training_seed=4"])
    touched = stage_config(other, stage) != stage_config(config, stage)
    assert touched == (stage in ("train_classifier", "train_diffusion", "evaluate"))


def test_the_gate_is_part_of_no_digest() -> None:
    assert chain_digests(load_config("digits", ["gate.min_psnr=25"])) == chain_digests(load_config("digits"))


def shared(*over: str, seeds: int = 1) -> dict[str, int]:
    """Return for each stage how many of its outputs several members share."""
    found: dict[str, int] = {}
    for stage, _, _ in plan_sweep("digits", [], list(over), None, seeds).shared():
        found[stage] = found.get(stage, 0) + 1
    return found


def test_guidance_shares_the_trained_models_a_set_for_each_seed() -> None:
    assert shared("diffusion.process.guidance=0,1,5", seeds=2) == {
        "meta_train": 1, "encode": 1, "train_classifier": 2, "train_diffusion": 2,
    }  # fmt: skip


def test_a_timestep_ratio_shares_all_but_the_diffusion_model() -> None:
    assert shared("diffusion.timestep_ratio=1,3") == {"meta_train": 1, "encode": 1, "train_classifier": 1}


def test_bits_share_the_field_and_seeds_of_one_width_the_functaset() -> None:
    assert shared("encode.quantization.bits=32,8,7,6", seeds=3) == {"meta_train": 1, "encode": 4}


def test_fewer_bits_are_made_from_the_member_of_32_bits_whose_latents_they_are() -> None:
    plan = plan_sweep("paper_imagenet_32x32x64", [], ["encode.quantization.bits=32,8,7,6"], None, 3)
    exact = [member for member in plan.members if member.config.encode.quantization.bits == 32]
    assert [plan.float_member(member) for member in plan.members] == [None] * 3 + [exact[0]] * 9
    crossed = plan_sweep("digits", [], ["encode.quantization.bits=8,32", "encode.steps=3,4"])
    sources = [crossed.float_member(member) for member in crossed.members]
    assert [source and source.values for source in sources] == [("32", "3"), ("32", "4"), None, None]
    few = plan_sweep("digits", [], ["encode.quantization.bits=8,6"])
    assert [few.float_member(member) for member in few.members] == [None, None]


def test_members_that_meta_train_share_nothing_and_repeat_the_seed_itself() -> None:
    plan = plan_sweep("digits", [], ["field.spatial,field.channels=[2,8],[4,2]"], None, 2)
    assert plan.shared() == []
    assert plan.seeded == "seed"
    assert [(m.config.field.spatial, m.config.field.channels, m.config.seed) for m in plan.members] == [
        (2, 8, 0), (2, 8, 1), (4, 2, 0), (4, 2, 1),
    ]  # fmt: skip


def test_the_first_seed_is_the_run_without_seeds() -> None:
    plan = plan_sweep("digits", ["training_seed=7"], ["diffusion.process.guidance=1,2"], None, 2)
    assert [member.seed for member in plan.members] == [7, 8, 7, 8]
    assert plan.members[0].digests == chain_digests(load_config("digits", ["training_seed=7"]))


def test_seeds_count_a_training_seed_up_too_where_members_meta_train() -> None:
    plan = plan_sweep("digits", ["training_seed=7"], ["field.width=32,64"], None, 2)
    assert plan.seeded == "seed, training_seed"
    assert [(m.seed, m.config.seed, m.config.training_seed) for m in plan.members] == [(0, 0, 7), (1, 1, 8)] * 2
    for stage in ("meta_train", "train_classifier", "train_diffusion"):
        seeds = [{k: v for k, v in stage_config(m.config, stage).items() if k == "seed"} for m in plan.members]
        assert seeds[0] != seeds[1]


def test_more_values_or_seeds_are_the_same_sweep_and_another_config_is_not() -> None:
    over = "diffusion.process.guidance="
    plan = plan_sweep("digits", [], [f"{over}0,1"])
    for same in (
        plan_sweep("digits", [], [f"{over}0,1,2"], None, 3),
        plan_sweep("digits", ["dispatch.workers=3", "gate.min_psnr=9", f"{over}5"], [f"{over}1,2"]),
    ):
        assert (same.keys, same.base) == (plan.keys, plan.base)
    for other in ("diffusion.steps=500", "seed=1", "training_seed=1", "classifier=null", "evaluation.samples=50"):
        assert plan_sweep("digits", [other], [f"{over}0,1"]).base != plan.base
    sections = plan_sweep("digits", [], ["classifier=null,{}"]).base
    assert sections == plan_sweep("digits", ["classifier.steps=99"], ["classifier=null,{}"]).base


def test_a_key_may_leave_out_the_sections_in_its_middle() -> None:
    plan = plan_sweep("digits", [], ["diffusion.timestep_ratio=1,3"])
    assert plan.axes[0].name == "diffusion.process.timestep_ratio"
    assert [m.config.diffusion.process.timestep_ratio for m in plan.members if m.config.diffusion] == [1, 3]


def test_draws_are_members_of_the_grid_all_different_and_the_same_again() -> None:
    over = ["classifier.learning_rate=1e-4,1e-3,1e-2", "classifier.label_smoothing=0,0.1", "classifier.noise=0,0.1,0.2"]
    grid = {member.values for member in plan_sweep("digits", [], over).members}
    drawn = [member.values for member in plan_sweep("digits", [], over, 7).members]
    assert len(grid) == 18
    assert len(set(drawn)) == 7 and set(drawn) <= grid
    assert drawn == [member.values for member in plan_sweep("digits", [], over, 7).members]
    assert drawn != [member.values for member in plan_sweep("digits", ["seed=1"], over, 7).members]


def test_members_go_to_folders_of_their_own_and_drop_the_gate() -> None:
    over = [f"evaluation.samples={','.join(map(str, range(100, 140)))}", "diffusion.model.multipliers=[1],[1,2]"]
    plan = plan_sweep("digits", ["gate.min_psnr=99"], over)
    assert len({member.folder for member in plan.members}) == 80
    assert all(len(member.name) <= 64 and member.config.gate.min_psnr is None for member in plan.members)


def test_lists_are_values() -> None:
    plan = plan_sweep("digits", [], ["diffusion.model.multipliers=[1],[1, 2]"])
    assert [m.config.diffusion.model.multipliers for m in plan.members if m.config.diffusion] == [(1,), (1, 2)]


def test_a_stage_that_some_members_do_not_have_is_shared_by_the_others() -> None:
    plan = plan_sweep("digits", [], ["classifier=null,{}", "diffusion.process.guidance=1,2"])
    assert [stages_of(member.config)[2] for member in plan.members] == ["train_diffusion"] * 2 + [
        "train_classifier"
    ] * 2
    assert [stage for stage, _, _ in plan.shared()].count("train_classifier") == 1


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--over", "diffusion.process.timestep_rato=1,2"], "did you mean 'diffusion.process.timestep_ratio'"),
        (["--over", "nonsense=1,2"], "unknown key 'nonsense'"),
        (["--over", "diffusion.process.guidance=1,-2"], "--over diffusion.process.guidance=-2: digits: diffusion.pro"),
        (["--over", "field.width=32,x"], "field.width: input should be a valid integer"),
        (["--over", "diffusion.process.guidance=1"], "a sweep of one member is a run"),
        (["--over", "diffusion.process.guidance=1,1.0"], "1 and 1.0 make the same run"),
        (["--over", "dispatch.workers=1,2"], "make the same run"),
        (["--over", "gate.min_psnr=1,2"], "decides nothing that a run makes"),
        (["--over", "field.width"], "expected KEY=VALUE,VALUE"),
        (["--over", "field.width=32,,64"], "expected KEY=VALUE,VALUE"),
        (["--over", "field.spatial,field.channels=2,4"], "values such as [V1,V2],[...]"),
        (["--over", "field.spatial,field.channels=[2,8,1],[4,2,1]"], "values such as [V1,V2],[...]"),
        (["--over", "field.width=32,64", "--over", "field.width=16,8"], "'field.width' twice"),
        (["--over", "field.width=32,64", "--random", "3"], "make 2 combinations"),
        (["--over", "field.width=32,64", "--random", "0"], "--random"),
        (["--over", "field.width=32,64", "--seeds", "0"], "--seeds"),
        (["--over", "field.width=32,64", "--seeds", "1.5"], "not a whole number"),
        (["--over", "seed=1,2", "--seeds", "2"], "leave out either --seeds or"),
        (["--over", "encode.quantization.bits=8,6", *NOTHING_LEARNS, "--seeds", "2"],
         "trains nothing after the functaset"),
        (["--over", "images.limit=" + ",".join(map(str, range(2, 203))), "--seeds", "100"], "more than 10000"),
        (["--over", "diffusion.model.channels=64,32"], "digits.channels-32: diffusion.model.head_channels: the 2x2"),
    ],
)  # fmt: skip
def test_a_bad_sweep_is_refused_in_one_line_before_anything_starts(
    arguments: list[str], expected: str, tmp_path: Path
) -> None:
    status, line = refused([*arguments, "--metric", "psnr_test"], tmp_path / "sweep")
    assert status == 2
    assert line.startswith("functa: ") and expected in line


def refused(arguments: list[str], root: Path) -> tuple[int | str | None, str]:
    """Return exit status and line of a refused `functa sweep digits`, after checking that it left nothing behind."""
    errors = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(errors):
        patch.setattr(sys, "argv", ["functa", "sweep", "digits", *arguments, "--root", str(root)])
        with pytest.raises(SystemExit) as ended:
            main()
    assert not root.exists() or not list(root.iterdir())
    (line,) = errors.getvalue().splitlines()
    return ended.value.code, line


GUIDANCE = ["--over", "diffusion.process.guidance=0,1"]


@pytest.mark.parametrize(
    ("metric", "meant"), [("psnr_tset", "did you mean psnr_test"), ("psnr_by_bit.6", "did you mean psnr_by_bits.6")]
)
def test_a_metric_that_no_run_measures_is_refused_before_anything_starts(
    metric: str, meant: str, tmp_path: Path
) -> None:
    status, line = refused([*GUIDANCE, "--metric", metric], tmp_path / "sweep")
    assert status == 2
    assert f"--metric {metric}: no run measures that; {meant}" in line


def test_a_root_to_reuse_from_must_hold_a_run_or_a_sweeps_shared_stages(tmp_path: Path) -> None:
    nowhere = tmp_path / "typo"
    status, line = refused([*GUIDANCE, "--metric", "psnr_test", "--from", str(nowhere)], tmp_path / "sweep")
    assert status == 1
    assert f"--from {nowhere}: no run has been started there" in line
    for kind, key in (("run", "stages/meta_train.json"), ("sweep", "shared/encode-abc/stages/encode.json")):
        (tmp_path / kind / key).parent.mkdir(parents=True)
        (tmp_path / kind / key).write_text("{}")
        SharedRoots(str(tmp_path), plan_sweep("digits", [], [GUIDANCE[1]]), str(tmp_path / kind))
    with pytest.raises(MissingInput, match="no run has been started there"):
        SharedRoots(str(tmp_path), plan_sweep("digits", [], [GUIDANCE[1]]), str(nowhere))


def test_a_sweep_over_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="needs an --over"):
        plan_sweep("digits", [], [])


@pytest.mark.parametrize(
    ("text", "value"),
    [("3", 3.0), ("1e-3", 1e-3), (" 2.5", 2.5), ("word", None), ("[1]", None), ("true", None), ("", None)],
)
def test_only_a_number_has_a_place_on_a_numeric_axis(text: str, value: float | None) -> None:
    assert number_of(text) == value


PAPER = (
    (Path(__file__).parents[3] / "docs/how-to/reproduce.md")
    .read_text()
    .partition("## Tables and figures as commands")[2]
)
ROWS = [line.strip("|").split(" | ") for line in PAPER.splitlines() if line.startswith("| ")][1:]
DOCUMENTED = re.findall(r"`functa (\w+ [^`]+)`", PAPER)


@pytest.mark.parametrize("command", [text for text in DOCUMENTED if text.startswith("sweep ")])
def test_a_documented_sweep_is_one_that_its_preset_can_run(command: str) -> None:
    _, bound, _ = app.parse_args(shlex.split(command), exit_on_error=False, print_error=False)
    given = bound.arguments
    assert [unknown_metric(metric) for metric in given["metric"]] == [""] * len(given["metric"])
    plan = plan_sweep(
        given["preset"], given.get("overrides", []), given["over"], given.get("draws"), given.get("seeds", 1)
    )
    for member in plan.members:
        check_models(member.config, "pipeline")
    learns = plan.members[0].digests["meta_train"] == plan.members[1].digests["meta_train"]
    assert learns == any(stage == "meta_train" for stage, _, _ in plan.shared())


@pytest.mark.parametrize("command", sorted({text for text in DOCUMENTED if not text.startswith("sweep ")}))
def test_every_other_documented_command_is_one_that_functa_takes(command: str) -> None:
    _, bound, _ = app.parse_args(shlex.split(command), exit_on_error=False, print_error=False)
    if command.startswith("run "):
        config = load_config(bound.arguments["preset"], bound.arguments.get("overrides"))
        check_models(config, "pipeline")
    else:
        assert command.startswith(("compare ", "table ")) and bound.arguments["roots"]


def test_every_table_and_figure_that_is_measured_has_a_command() -> None:
    named = {found for title, _ in ROWS for found in re.findall(r"(?:Table|Fig\.) \d+", title)}
    # Fig. 1 is curated samples beside figures of the tables.
    assert named == {f"Table {number}" for number in range(1, 9)} | {f"Fig. {number}" for number in range(2, 14)}
    assert all("`functa " in commands for _, commands in ROWS)


def test_the_sections_that_the_commands_point_to_are_in_the_report() -> None:
    pages = [path.read_text() for path in (Path(report.__file__).parent).rglob("*") if path.suffix in (".py", ".j2")]
    named = {title for _, commands in ROWS for title in re.findall(r"\*([A-Z][^*]+)\*", commands)}
    assert {"Memorisation", "Latents", "Samples"} <= named
    for title in named:
        assert any(f'"{title}"' in text or f">{title}</h2>" in text for text in pages), title
