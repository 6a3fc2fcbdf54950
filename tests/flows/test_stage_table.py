"""A stage is added by its flow and one entry in the table; everything else follows."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from functa.flows.config.digests import chain_digests, levels, stage_config, stages_of
from functa.flows.config.load import load_config
from functa.tasks.stage_table import STAGES, Stage
from tests.helpers.flows.prefect_server import PROJECT
from tests.helpers.flows.trained_root import trained_root

TOY = Stage(
    name="count_rows",
    summary="Count the rows of each split.",
    label="Count the rows",
    product="row counts",
    output="row_counts",
    sections=("images",),
    inputs=("encode",),
    queue="cpu",
    module="toy_stage",
)

FLOW = """
import numpy as np
from functa.flows.stage_flow import stage_flow
from functa.storage.places.address import open_location
from functa.storage.runs.checkpoints import save_checkpoint

@stage_flow
def count_rows(ledger):
    with ledger.working("count_rows") as record:
        rows = ledger.require("encode").figures["info"]["rows_by_split"]
        counts = {split: np.array(count) for split, count in rows.items()}
        marks = {"finished": True, "weights_digest": "as-many-as-there-are"}
        save_checkpoint(open_location(ledger.output(record)), 0, counts, marks)
        ledger.finish(record, marks["weights_digest"], {"counted_rows": sum(rows.values())})
"""

COMMAND = """
from functa.tasks.stage_table import STAGES, Stage
STAGES["count_rows"] = Stage(
    name="count_rows", summary="Count the rows of each split.", label="Count the rows", product="row counts",
    output="row_counts", sections=("images",), inputs=("encode",), queue="cpu", module="toy_stage",
)
from functa.flows.cli.main import main
main()
"""


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Stage:
    monkeypatch.setitem(STAGES, TOY.name, TOY)
    return TOY


def command(folder: Path, *arguments: str) -> str:
    """The command with the toy stage in its table, as a person runs it."""
    (folder / "toy_stage.py").write_text(FLOW)
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, *arguments], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.server
@pytest.mark.timeout(900)
def test_a_stage_added_to_the_table_is_a_command_that_runs_and_has_a_state(tmp_path: Path) -> None:
    root = tmp_path / "root"
    ledger = trained_root(root, stages=("meta_train", "encode"))
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(ledger.config.model_dump(mode="json")))
    asked = ("count-rows", str(config), "--root", str(root))
    assert "Count the rows of each split." in command(tmp_path, "--help")
    assert "count-rows: done" in command(tmp_path, *asked)
    assert "count-rows is up to date" in command(tmp_path, *asked)
    assert '"count_rows": "finished"' in command(tmp_path, "status", str(root), "--json")
    assert "count_rows" in command(tmp_path, "show", str(config), "--all")


def test_a_stage_added_to_the_table_is_planned_and_has_a_digest_of_its_own(toy: Stage) -> None:
    config, other = load_config("digits"), load_config("digits", ["images.limit=300"])
    before = {name: digest for name, digest in chain_digests(config).items() if name != toy.name}
    assert stages_of(config)[-1] == toy.name
    assert toy.name in levels(config)[2]  # beside the trainings, after encode and before evaluate
    assert chain_digests(config)[toy.name] != chain_digests(other)[toy.name]
    assert {key.partition(".")[0] for key in stage_config(config, toy.name)} == {"images"}
    STAGES.pop(toy.name)
    assert chain_digests(config) == before  # the others' digests do not depend on it


def test_a_stage_added_to_the_table_is_deployed(toy: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    from functa.deploy.bootstrap import Target, render

    for name in ("FUNCTA_ROOT", "FUNCTA_CRON"):
        monkeypatch.setenv(name, "")
    document = render(yaml.safe_load((PROJECT / "deploy" / "prefect.yaml").read_text()), Target("root"))
    (deployed,) = (each for each in document["deployments"] if each["name"] == "count-rows")
    assert deployed["entrypoint"] == "toy_stage.count_rows"
    assert deployed["description"] == toy.summary
    assert deployed["work_pool"]["work_queue_name"] == "cpu"


def test_a_stage_added_to_the_table_is_named_in_the_report(toy: Stage) -> None:
    from functa.tasks.report.words import stage_name

    assert stage_name("count_rows") == "Count the rows"
    assert stage_name("encode") == "Encode into a functaset"
