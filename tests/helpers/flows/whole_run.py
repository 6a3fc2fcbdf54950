"""A whole small run as a person gives it, which can be killed at random instants and given again until it finishes."""

import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.helpers.flows.prefect_server import PROJECT, clean_environment
from tests.helpers.flows.tiny_config import TINY

# A checkpoint after every step: kills fall into the writing of checkpoints, and the kept ones are always the same.
SETTINGS = [
    *TINY,
    *(
        f"{section}.{key}"
        for section in ("meta_train", "classifier", "diffusion", "evaluation.pixel_classifier")
        for key in ("checkpoint_seconds=1e-9", "log_every=5")
    ),
    "diffusion.model.channels=16",
    "diffusion.model.head_channels=16",
    "evaluation.bits=[8,4]",
    "evaluation.compression.jpeg=[50]",
    "evaluation.compression.webp=[50]",
    "evaluation.perturbation.images=2",
    "evaluation.perturbation.positions=4",
    "evaluation.memorization.null_images=50",
    "evaluation.memorization.draws_per_class=10",
    "evaluation.pixel_classifier.steps=10",
    "evaluation.pixel_classifier.width=8",
]
TARGETS = ("main process", "training", "whole group", "Ctrl-C")
PATIENCE = 600  # seconds for one whole run on a busy machine
CODE = "from functa.flows.cli.main import main; main()"


@dataclass
class WholeRun:
    """A root with a Prefect home of its own, in which one command is given again and again."""

    folder: Path
    api: str = ""  # of a server that all runs share; empty: an embedded one of each command
    kills: list[str] = field(default_factory=list)
    families: dict[int, psutil.Process] = field(default_factory=dict)  # every process that a killed command had started

    @property
    def root(self) -> Path:
        return self.folder / "root"

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text(errors="replace")

    def start(self, **environment: str) -> subprocess.Popen[bytes]:
        """Start the run, with these variables added to its environment."""
        self.folder.mkdir(parents=True, exist_ok=True)
        environment |= {"PREFECT_API_URL": self.api} if self.api else {}
        environment |= {"PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": str(PATIENCE)}
        sets = [part for setting in SETTINGS for part in ("--set", setting)]
        with open(self.folder / "log", "ab") as log:
            return subprocess.Popen(
                [sys.executable, "-c", CODE, "run", "digits", *sets, "--root", str(self.root)],
                cwd=PROJECT, stdout=log, stderr=log, start_new_session=True,
                env=clean_environment(self.folder / "home") | environment,
            )  # fmt: skip

    def undisturbed(self) -> float:
        """Run to the end; return the seconds that it took."""
        began = time.monotonic()
        status = self.start().wait(PATIENCE)
        assert status == 0, self.log[-3000:]
        return time.monotonic() - began

    def until_finished(self, dice: random.Random, kills: int, span: float) -> None:
        """Give the command until it has finished; kill it at most `kills` times, each within `span` seconds."""
        while (status := self._once(dice, kills, span)) != 0:
            # Three lost trainings end a run, which it reports in one line. Otherwise the kill itself ended it.
            expected = {"training": 1, "Ctrl-C": 128 + signal.SIGINT}.get(self.kills[-1].split(": ")[1])
            assert status in (-signal.SIGKILL, expected), self.log[-3000:]

    def left_behind(self, seconds: float) -> list[str]:
        """Return the processes of killed commands that still run after so many seconds, having ended them."""
        _, alive = psutil.wait_procs(list(self.families.values()), seconds)
        alive = [each for each in alive if each.status() != psutil.STATUS_ZOMBIE]
        names = [cmdline(each) for each in alive]
        for each in alive:
            each.kill()
        return names

    def _once(self, dice: random.Random, kills: int, span: float) -> int:
        process = self.start()
        while len(self.kills) < kills:
            after = dice.uniform(0, span)
            with suppress(subprocess.TimeoutExpired):
                return process.wait(after)
            target = self._kill(process, dice.choice(TARGETS))
            self.kills.append(f"{after:.1f} s: {target}")
            if target != "training":
                break
        return process.wait(PATIENCE)

    def _kill(self, process: subprocess.Popen[bytes], target: str) -> str:
        """Kill or interrupt the target, the main process where there is no such; return what it was."""
        below = self._below(process.pid)
        trainings = [each for each in below if "functa.tasks.training" in cmdline(each)]
        if target == "training" and trainings:
            trainings[-1].kill()
            return target
        if target == "Ctrl-C" and below:  # before it has children it is still importing
            process.send_signal(signal.SIGINT)
            return target
        process.kill()
        if target != "whole group":
            return "main process"
        for each in below:
            with suppress(psutil.NoSuchProcess):
                each.kill()
        return target

    def _below(self, pid: int) -> list[psutil.Process]:
        with suppress(psutil.NoSuchProcess):
            found = psutil.Process(pid).children(recursive=True)
            self.families |= {each.pid: each for each in found}
            return list(found)
        return []


def cmdline(process: psutil.Process) -> str:
    with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
        return " ".join(process.cmdline())
    return ""


def kills_of_this_run() -> int:
    """Return how many kills `make test-faults` spreads over all whole runs."""
    return int(os.environ.get("FUNCTA_KILLS", "10"))
