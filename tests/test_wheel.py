"""The wheel has everything that the package needs, and works without a checkout, beside packages of the same names."""

import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from tests.helpers.flows.prefect_server import Served, clean_environment, eventually, free_port
from tests.helpers.flows.tiny_config import TINY

PROJECT = Path(__file__).parents[1]
PACKAGES = ("flows", "tasks", "models", "storage", "deploy")
NEEDED = ("*.py", "*.yaml", "*.j2", "*.json", "*.safetensors", "py.typed")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel, built from a copy of the sources: an older build beside them would be packed too."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for package in ("functa", *PACKAGES):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(PROJECT / package, source / package, symlinks=True, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(PROJECT / name, source)
    call(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir",
         str(folder), str(source), folder=folder)  # fmt: skip
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh virtual environment with the wheel alone; what it depends on is read from that of the tests."""
    folder = tmp_path_factory.mktemp("installed") / "venv"
    call(sys.executable, "-m", "venv", "--without-pip", str(folder), folder=folder.parent)
    call(sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), "install", "--quiet", "--no-deps",
         "--no-index", str(wheel), folder=folder.parent)  # fmt: skip
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    return folder


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder with packages models, tasks and storage of its own."""
    folder = tmp_path_factory.mktemp("project")
    for name in PACKAGES:
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text(f"raise ImportError('this is the {name} of the user')\n")
    return folder


def apart(folder: Path) -> dict[str, str]:
    """Return an environment with nothing of the checkout in it."""
    return {k: v for k, v in clean_environment(folder / "home").items() if not k.startswith("PYTHON")}


def call(*command: str, folder: Path, timeout: float = 250) -> str:
    """Run a command in a folder, with nothing of the checkout in its environment; return what it printed."""
    done = subprocess.run(
        command, cwd=folder, env=apart(folder), capture_output=True, text=True, timeout=timeout, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_wheel_has_every_file_that_the_package_needs(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    expected = {f"functa/{path.name}" for path in (PROJECT / "functa").iterdir() if path.is_file()}
    for package in PACKAGES:
        for pattern in NEEDED:
            expected |= {f"functa/{path.relative_to(PROJECT)}" for path in (PROJECT / package).rglob(pattern)}
    assert {"functa/py.typed", "functa/flows/presets/digits.yaml", "functa/deploy/prefect.yaml"} < expected
    assert any(name.endswith(".j2") for name in expected)
    assert packed == expected


CODE = """
import functa
assert functa.__file__.startswith({prefix!r}), functa.__file__
config = functa.load_config("digits")
for name in functa.__all__:
    getattr(functa, name)
import functa.deploy.bootstrap, functa.flows.pipeline, functa.tasks.report.page
assert functa.deploy.bootstrap.PREFECT_FILE.is_file()
"""


def test_an_installed_package_ignores_packages_of_the_same_names(environment: Path, project: Path) -> None:
    """The folder that Python starts in comes first on its path."""
    call(str(environment / "bin" / "python"), "-c", CODE.format(prefix=str(environment)), folder=project)
    command = str(environment / "bin" / "functa")
    assert "Spatial functa" in call(command, "--help", folder=project)
    assert "digits" in call(command, "presets", folder=project)


@pytest.mark.slow
@pytest.mark.server
@pytest.mark.timeout(1200)
def test_an_installed_package_runs_the_pipeline_and_the_readmes_examples(environment: Path, project: Path) -> None:
    overrides = [argument for setting in TINY for argument in ("--set", setting)]
    call(str(environment / "bin" / "functa"), "run", "digits", *overrides, folder=project, timeout=900)
    assert (project / "functa-runs" / "digits" / "report.html").is_file()
    blocks = re.findall(r"^```python\n(.*?)^```", (PROJECT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    assert blocks
    script = project / "readme.py"
    script.write_text("\n".join(blocks))
    call(str(environment / "bin" / "python"), os.fspath(script), folder=project, timeout=290)


@pytest.mark.slow
@pytest.mark.server
@pytest.mark.timeout(600)
def test_doctor_and_up_of_an_installed_package_need_no_checkout(environment: Path, project: Path) -> None:
    command, port = str(environment / "bin" / "functa"), free_port()
    found = subprocess.run([command, "doctor"], cwd=project, env=apart(project), capture_output=True, text=True)
    assert re.search(r"^-- +lock +installed as a package, without a checkout", found.stdout, re.MULTILINE)
    assert re.search(r"^ok +versions +[0-9]+ packages fit the requirements *$", found.stdout, re.MULTILINE)
    assert "git checkout" not in found.stdout + found.stderr
    with subprocess.Popen(
        [command, "up", "--port", str(port), "--root", "runs/wheel"], cwd=project,
        env=apart(project) | {"PYTHONUNBUFFERED": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        try:
            printed = []
            for line in process.stdout:  # ends with the process
                printed.append(line)
                if "Ctrl-C" in line:
                    break
            served = Served(process, port, project / "home", project / "runs" / "wheel", "".join(printed))
            (found_there,) = (d for d in served.ask("deployments/filter", {}) if d["name"] == "re-encode")
            body = {"state": {"type": "SCHEDULED"}}
            run = served.ask(f"deployments/{found_there['id']}/create_flow_run", body)["id"]
            eventually(lambda: served.ask(f"flow_runs/{run}")["state_type"] == "COMPLETED", 120, "a worker runs it")
        finally:
            process.send_signal(signal.SIGINT)
        assert process.wait(90) == 0
