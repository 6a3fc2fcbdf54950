"""The job scripts of the page on Slurm: a shell accepts them, and they ask for a signal before their time is up."""

import subprocess

from tests.helpers.docs.pages import DOCS, blocks


def test_the_scripts_are_shell_and_ask_for_a_signal_before_the_end() -> None:
    scripts = [block.text for block in blocks(DOCS / "how-to/slurm.md", "bash")]
    assert len(scripts) == 2
    for text in scripts:
        subprocess.run(["bash", "-n", "-c", text], check=True)
        assert text.startswith("#!/bin/bash\n")
        # Slurm sends it to the shell of the script, whose place the command has taken by `exec`.
        assert "#SBATCH --signal=B:TERM@" in text and "\nexec .venv/bin/" in text
