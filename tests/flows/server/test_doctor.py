"""`functa doctor` names what is missing on a machine, and how to fix it."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from functa.flows.server import doctor
from functa.models.compute import compilation
from tests.helpers.flows.prefect_server import free_port


def test_doctor_names_what_it_finds_and_how_to_fix_what_is_missing(home: Path, tmp_path: Path) -> None:
    checks = {check.name: check for check in doctor.doctor(str(tmp_path / "not" / "yet"))}
    assert list(checks) == ["python", "torch", "compiler", "disk", "memory", "prefect", "port", "lock", "versions"]
    assert all(check.fix for check in checks.values() if check.ok is False)
    assert checks["python"].ok
    assert checks["lock"].ok
    assert "embedded" in checks["prefect"].detail


def empty_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("CXX", raising=False)


def no_headers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilation, "HEADERS", "no-such-header.h")


@pytest.mark.parametrize(("spoil", "package"), [(empty_path, "g++"), (no_headers, "python3-dev")])
def test_a_missing_piece_of_the_compiler_is_named_with_its_package_before_anything_is_built(
    spoil: Callable[[pytest.MonkeyPatch], None], package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch)
    device = torch.device("cpu")
    check = doctor.check_compiler()
    compiled, why = compilation.should_compile("auto", 1e18, device)
    assert check.ok is None
    assert package in check.fix
    assert not compiled
    assert package in why
    with pytest.raises(ValueError, match=re.escape(package)):
        compilation.should_compile("on", 1e18, device)


def test_another_compiler_counts_only_if_inductor_is_set_to_use_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inductor calls $CXX or g++; a clang++ in the path is not tried."""
    empty_path(monkeypatch)
    compiler = tmp_path / "clang++"
    compiler.write_text("#!/bin/sh\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "C++ compiler" in compilation.missing(torch.device("cpu"))
    monkeypatch.setenv("CXX", "clang++")
    assert "C++ compiler" not in compilation.missing(torch.device("cpu"))


def test_doctor_reports_a_server_that_does_not_answer(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_URL", f"http://127.0.0.1:{free_port()}/api")
    check = doctor.check_prefect()
    assert check.ok is False
    assert "does not answer" in check.detail


def test_doctor_reads_pins_of_this_platform_alone() -> None:
    lock = (
        "numpy==2.1.0 ; sys_platform == 'never' \\\n    --hash=sha256:00\n"
        "numpy==2.2.0 ; sys_platform != 'never' \\\n    --hash=sha256:00\n"
        "torch==2.11.0+cpu\n# comment==1\n"
    )
    assert doctor.read_pins(lock) == {"numpy": ["2.2.0"], "torch": ["2.11.0"]}


def test_a_broken_package_is_a_finding_not_a_traceback() -> None:
    def check_torch() -> doctor.Check:
        raise OSError("libtorch.so: cannot open\nshared object")

    check = doctor.guarded(check_torch)
    assert (check.name, check.ok) == ("torch", False)
    assert "\n" not in check.detail
