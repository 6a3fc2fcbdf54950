"""Names that are markup, commands or escape sequences: shown as they are wherever they come out; secrets nowhere."""

import csv
import io
import json
import logging
import os
import re
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.table import Table

from functa.flows.server.api import check_api
from functa.flows.server.console import print_line, text_console
from functa.flows.server.session import shortened
from functa.storage.errors import FunctaError, StorageError, one_line, printable
from functa.storage.places.address import open_location
from functa.tasks.report import artifacts
from functa.tasks.report.blocks import Drawing
from functa.tasks.report.files import as_csv
from functa.tasks.report.page import _inline
from functa.tasks.report.sections.classification import confusion_chart
from tests.helpers.tasks.report_page import Page

pytestmark = pytest.mark.attacks

NAMES = [
    "<script>alert(1)<", "'\"><img src=x onerror=alert(1)>", "![x](http:evil.png)", "[click](javascript:alert(1))",
    "a|b", "\x1b[31mred\x1b]0;title\x07", "new\nline", "\u202egnp.exe", "=HYPERLINK(1)", "@SUM(1)", "$\\frac{1}{0}$",
    "{{ 7*7 }}", "`tick`", "[red]markup", "%(x)s {0}", "www.evil.example", "url(#x) #222222 id=\"x\"",
]  # fmt: skip

SECRET = "canary5ecret7f3a"

QUICK = [
    "images.source=folder", "images.channels=1", "images.max_bad_fraction=1", "meta_train.steps=4",
    "meta_train.warmup=0",
    "meta_train.validation_images=4", "classifier.steps=4", "classifier.warmup=0", "diffusion.steps=4",
    "diffusion.warmup=0", "diffusion.process.sampling_steps=2", "evaluation.quick=true", "evaluation.samples=8",
    "evaluation.pixel_classifier.steps=4", "evaluation.pixel_classifier.warmup=0", "dispatch.device=cpu",
    "encode.quantization.max_clip_fraction=1",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_errors_lines_and_tables_show_a_name_and_do_not_obey_it(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    print_line(f"{name}: done")
    console = text_console(width=200)
    console.print(f"{name}: done")
    table = Table(name, title=name)
    table.add_row(name)
    console.print(table)
    out = capsys.readouterr().out
    assert all(line.isprintable() for line in out.split("\n"))
    assert out.split("\n")[0] == out.split("\n")[1] == f"{printable(name)}: done"
    assert out.count(printable(name)) >= 4
    for message in (str(FunctaError(f"{name}: bad")), one_line(ValueError(f"{name}: bad"))):
        assert message.isprintable()


@pytest.mark.parametrize("name", NAMES)
def test_a_log_line_is_one_line_of_text(name: str) -> None:
    record = logging.LogRecord("prefect.task_runs", logging.INFO, "", 0, f"{name}: unreadable", None, None)
    assert shortened(logging.Formatter("%(message)s").format)(record).isprintable()


@pytest.mark.parametrize("name", NAMES)
def test_a_spreadsheet_computes_no_name_and_reads_it_back(name: str) -> None:
    (row,) = csv.reader(io.StringIO(as_csv([[name, -1.5, "-2", None]]).decode()))
    assert not row[0].startswith(("=", "+", "-", "@"))
    assert row[0].lstrip("'") == printable(name).lstrip("'")
    assert row[1:] == ["-1.5", "-2", ""]


@pytest.mark.parametrize("name", NAMES)
def test_the_cells_of_a_table_artifact_are_text_to_its_markdown_renderer(name: str) -> None:
    ((_, cell), (_, number)) = artifacts.cells([{"where": name, "value": 2.5}])[0].items()
    assert number == 2.5
    assert re.fullmatch(r"[\w ,]*", re.sub(r"&#\d+;", "", cell))


def test_a_charts_names_are_its_text_whatever_they_look_like() -> None:
    drawn = _inline(Drawing("confusion", "", confusion_chart(np.eye(len(NAMES), dtype=int), NAMES)))
    assert drawn is not None
    page = Page(str(drawn))
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "img", "a", "image", "foreignobject"})
    for name in NAMES:
        shown = "".join(letter if letter.isprintable() else "?" for letter in name)
        assert (shown if len(shown) <= 12 else shown[:11]) in page.text


@pytest.mark.parametrize("address", ["http://user:{}@127.0.0.1:9", "http://{}@127.0.0.1:9"])
def test_credentials_in_an_address_are_in_no_message(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = address.format(SECRET)
    assert SECRET not in str(FunctaError(f"{secret}/api does not answer"))
    monkeypatch.setenv("PREFECT_API_URL", f"{secret}/api")
    with pytest.raises(FunctaError) as error:
        check_api()
    assert SECRET not in str(error.value)


def test_credentials_of_s3_are_in_no_message(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.setenv(name, SECRET)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://user:{SECRET}@127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    for uri in (f"s3://{SECRET}:{SECRET}@bucket/x", f"s3://user:{SECRET}@bucket", f"ftp://user:{SECRET}@host/x"):
        with pytest.raises(StorageError) as error:
            open_location(uri)
        assert SECRET not in str(error.value)


@pytest.fixture(scope="module")
def hostile_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """Run everything on classes of such names, secrets in the environment; return root, Prefect's home, the output."""
    folder = tmp_path_factory.mktemp("run")
    for label, name in enumerate(NAMES):
        for split, count in (("train", 3), ("test", 2)):
            (folder / "x" / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = np.random.default_rng(100 * label + number).integers(0, 255, (8, 8), np.uint8)
                Image.fromarray(pixels).save(folder / "x" / split / name / f"{number}.png")
        (folder / "x" / "train" / name / f"bad {name}.png").write_bytes(b"no image")
    names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "HF_TOKEN", "DATABASE_PASSWORD")
    secrets = {name: f"{SECRET}-{name}" for name in names}
    sets = [part for each in [*QUICK, f"images.location={folder / 'x'}"] for part in ("--set", each)]
    done = subprocess.run(
        [sys.executable, "-c", "from functa.flows.cli.main import main; main()",
         "run", "digits", "--root", str(folder / "root"), *sets],
        env=os.environ | secrets | {"PREFECT_HOME": str(folder / "prefect"), "PREFECT_API_URL": ""},
        cwd=folder, capture_output=True, text=True, errors="surrogateescape", timeout=1200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return folder / "root", folder / "prefect", done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.server
@pytest.mark.timeout(1500)
def test_a_run_on_hostile_names_shows_them_as_text_and_secrets_nowhere(hostile_run: tuple[Path, Path, str]) -> None:
    root, home, output = hostile_run
    assert [line for line in output.split("\n") if not line.isprintable()] == []
    page = Page((root / "report.html").read_text())
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "iframe", "form", "link", "base"})
    assert all(source.startswith("data:image/") for source in page.attributes("src"))
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    for name in NAMES:
        assert printable(name) in page.text or name in page.text  # a new line is a blank on a page
    for path in root.rglob("*.json"):
        json.loads(path.read_text())
    for path in root.rglob("*.csv"):
        cells = [cell for row in csv.reader(io.StringIO(path.read_text())) for cell in row]
        assert not [cell for cell in cells if cell.startswith(("=", "+", "@"))], path
    for path in [path for top in (root, home) for path in top.rglob("*") if path.is_file()]:
        assert SECRET.encode() not in path.read_bytes(), path
    assert SECRET not in output
    _check_artifacts(home)


def _check_artifacts(home: Path) -> None:
    with sqlite3.connect(next(home.glob("*.db"))) as database:
        rows = database.execute("select type, data, description from artifact").fetchall()
    assert {kind for kind, _, _ in rows} >= {"markdown", "table"}
    for kind, data, description in rows:
        texts = [description or ""]
        if kind == "markdown":
            texts.append(json.loads(data))
        if kind == "table":
            texts += [cell for row in json.loads(json.loads(data)) for cell in row.values() if isinstance(cell, str)]
        for text in texts:
            plain = re.sub(r"!\[[a-z0-9 ]*\]\(data:image/png;base64,[\w+/=]*\)", "", text)
            assert not re.search(r"\]\(|<|javascript:|www\.|https?:", plain), plain[:300]
