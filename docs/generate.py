"""Write the reference pages that follow from the code: `python docs/generate.py`, which `make docs` calls.

They are committed, so that they can be read as files; a test compares them with the code.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from functa.flows.cli.presets import PAPER_FIGURES, list_presets
from functa.flows.config.reference import section_description, settings_reference
from functa.flows.config.schema import PipelineConfig
from functa.tasks.evaluation.catalogue import BY_SPACE, SPACES, catalogue, groups
from functa.tasks.evaluation.evaluator import Described
from functa.tasks.stage_table import STAGES


def write_pages(folder: Path) -> None:
    """Write every generated page below the folder of the documentation."""
    for path, page in PAGES.items():
        (folder / path).write_text(page(), encoding="utf-8")


def command_page() -> str:
    """Return every command with its arguments, as the command itself describes them."""
    from functa.flows.cli.main import app

    generated = app.generate_docs(output_format="markdown")
    commands = dict(re.findall(r"^## functa (\S+)\n(.*?)(?=^## |\Z)", generated, re.DOTALL | re.MULTILINE))
    groups = {name: app[name].group[0] for name in commands}
    lines = [COMMAND_HEAD]
    for group in sorted(set(groups.values()), key=lambda group: group.sort_key[1]):
        lines += [f"\n## {group.name}\n"]
        lines += [_under(name, body) for name, body in commands.items() if groups[name] is group]
    return "\n".join(lines)


def stages_page() -> str:
    """Return every stage: its command, what it does, what it reads and where its output lies."""
    head = ("Stage", "Does", "Reads the output of", "Output in the root", "Sections that decide the result")
    rows = (
        (f"`{stage.command}`", stage.summary, _names(STAGES[name].command for name in stage.inputs),
         f"`{stage.output}/`", _names(stage.sections))
        for stage in STAGES.values()
    )  # fmt: skip
    return "\n".join([STAGES_HEAD, *_table(head, rows)]) + "\n"


def _names(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _under(name: str, body: str) -> str:
    """Return a command's description one level lower, below the heading of its group."""
    body = STARTED_BY.sub(r"\1", body)
    return f"### functa {name}\n" + re.sub(r"^### ", "#### ", body, flags=re.MULTILINE)


def settings_page() -> str:
    """Return every setting by section: key, meaning, what it accepts, default."""
    rows = settings_reference()
    lines = [SETTINGS_HEAD]
    for section in dict.fromkeys(row.section for row in rows):
        title, about = _section_words(section)
        lines += [f"\n## {title}\n", about, ""]
        lines += _table(
            ("Key", "Meaning", "Accepts", "Default"),
            ((f"`{row.key}`", row.description, _accepts(row.type, row.bounds), _code(row.default))
             for row in rows if row.section == section),
        )  # fmt: skip
    return "\n".join(lines) + "\n"


def metrics_page() -> str:
    """Return every key of metrics.json by group: name, unit, meaning, which direction is better."""
    figures = catalogue()
    lines = [METRICS_HEAD]
    for group in groups():
        rows = [
            (f"`{key}`", f"**{figure.name}.** {_sentence(figure.meaning)}", _unit(key, figure), figure.better)
            for key, figure in figures.items()
            if figure.group == group
        ]
        if rows:
            lines += [f"\n## {group}\n", *_table(("Key", "Meaning", "Unit", "Better"), rows)]
    lines += ["\n## Feature spaces\n"]
    lines += _table(("Name", "Features"), ((f"`{key}`", words) for key, words in SPACES.items()))
    return "\n".join(lines) + "\n"


def presets_page() -> str:
    """Return every preset: data, size, time, purpose, and the paper's figures."""
    presets = list_presets(parameters=False)
    rows_of_the_paper = [preset for preset in presets if preset["name"].startswith("paper_")]
    lines = [PRESETS_HEAD, "\n## Presets of this project\n"]
    lines += _presets([preset for preset in presets if preset not in rows_of_the_paper], {})
    lines += ["\n## Rows of the paper's tables\n", PAPER_PRESETS, "", *_presets(rows_of_the_paper, PAPER_FIGURES)]
    return "\n".join(lines) + "\n"


def _presets(presets: Iterable[Mapping[str, Any]], figures: Mapping[str, str]) -> list[str]:
    head = ("Preset", "Purpose", "Data", "Pixels", "Latent", "Time", *figures.values())
    return _table(
        head,
        (
            (f"`{preset['name']}`", preset["purpose"], preset["data"], str(preset["resolution"]), preset["latent"],
             preset["time"], *(str(preset["paper"].get(key, "")) for key in figures))
            for preset in presets
        ),
    )  # fmt: skip


def _section_words(section: str) -> tuple[str, str]:
    if not section:
        return "Run", "Keys of the whole run."
    title = PipelineConfig.model_fields[section].title or section
    return title, section_description(section)


def _accepts(kind: str, bounds: str) -> str:
    return f"{kind}, {bounds}" if bounds else kind


def _sentence(text: str) -> str:
    return text if text.endswith(".") or not text else f"{text}."


def _unit(key: str, metric: Described) -> str:
    unit = {"plain": "", "exact": "", "share": "share, 0 to 1"}.get(metric.unit, metric.unit)
    return f"{unit}; by feature space".removeprefix("; ") if key in BY_SPACE else unit


def _code(text: str) -> str:
    return f"`{text}`" if text and text != "required" else text


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    cells = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in cells]


# Where this runs as `python -m NAME`, cyclopts repeats "-m NAME" behind the names of commands.
STARTED_BY = re.compile(r"^(functa(?: [a-z][a-z-]*)+) -m \S+", re.MULTILINE)

COMMAND_HEAD = """# Command

The command is `functa`. In a checkout it lies at `.venv/bin/functa`; activate the environment to use it by name.

Exit status: **0** success, **1** a failure at run time (a missing folder, a full disk, a failed stage), **2** an error
in the arguments or the configuration. An error is one line; `--debug` adds the traceback. Every root and URI may be a
folder or `s3://bucket/prefix` ([S3](../how-to/s3.md)).
"""

STAGES_HEAD = """# Stages

A run is these stages. Each is a command, a Prefect flow and a deployment of the same name. A stage is done again only
if a setting of its sections, or the output of a stage that it reads, changed.
"""

SETTINGS_HEAD = """# Settings

Every setting has a key, such as `field.width`. Set it with `--set field.width=128` (repeatable), in a YAML file, or in
the form of the server's UI. `functa show PRESET --all` prints the values that a preset resolves to.

Write lists as `[8,6,4]` and no value as `null`: `--set classifier=null` leaves that section out.
"""

METRICS_HEAD = """# Metrics

Every figure of a run's `metrics.json`, by its key. A value that was not measured is absent. Keys with one value for
each feature space hold a group: `fd.classifier` is the Fréchet distance on features of the pixel classifier.
"""

PRESETS_HEAD = """# Presets

A preset is a complete configuration by name. `functa presets` lists them, `functa show PRESET --all`
prints one in full.
*Pixels* is the side of the images, *Latent* is positions x positions x channels.
"""

PAPER_PRESETS = """Each setting of these presets is marked `paper` (the paper gives it for this row) or `assumed`
(it does not): see [where the paper is silent](../paper.md). They were written for GPUs; `functa show` estimates the
work."""

PAGES: dict[str, Callable[[], str]] = {
    "reference/command.md": command_page,
    "reference/stages.md": stages_page,
    "reference/settings.md": settings_page,
    "reference/metrics.md": metrics_page,
    "reference/presets.md": presets_page,
}

if __name__ == "__main__":
    write_pages(Path(__file__).parent)
