"""Prefect's folder, proxies and the server that the user named: a fault is one line before anything starts."""

import os
import stat
import urllib.request
from pathlib import Path

import pytest

from functa.flows.server import api
from functa.flows.server.api import OperateError
from tests.helpers.flows.prefect_server import free_port


def test_the_projects_prefect_has_a_folder_of_its_own(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PREFECT_HOME")
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert api.prefect_home() == tmp_path / ".local/share/functa/prefect"
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    api.prepare_environment()
    assert os.environ["PREFECT_HOME"] == f"{tmp_path}/data/functa/prefect"
    monkeypatch.setenv("PREFECT_HOME", "~/mine")
    assert api.prefect_home() == tmp_path / "mine"


def test_a_profile_of_another_project_is_not_used(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFECT_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".prefect").mkdir()
    profile = 'active = "mine"\n[profiles.mine]\nPREFECT_API_URL = "http://elsewhere/api"\n'
    (tmp_path / ".prefect" / "profiles.toml").write_text(profile)
    assert api.configured_api() == ""
    assert api.note_on_profile() == (
        f"the Prefect profile in {tmp_path}/.prefect names a server; to use it set PREFECT_API_URL=http://elsewhere/api"
    )


def test_a_folder_that_cannot_be_written_is_named_before_a_server_starts(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "file" / "home"))
    with pytest.raises(OperateError, match=f"{tmp_path}/file/home: cannot be written .*; set PREFECT_HOME to"):
        api.check_home()


def test_no_proxy_is_asked_for_this_machine(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "example.org")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    api.prepare_environment()
    assert os.environ["NO_PROXY"] == os.environ["no_proxy"] == "example.org,127.0.0.1,localhost,::1"
    assert urllib.request.proxy_bypass("127.0.0.1:4200")
    assert not urllib.request.proxy_bypass("example.com")


@pytest.mark.faults
def test_a_named_server_that_does_not_answer_is_one_line(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    api.check_api()  # none is named
    address = f"http://127.0.0.1:{free_port()}/api"
    monkeypatch.setenv("PREFECT_API_URL", address)
    with pytest.raises(OperateError, match=f"PREFECT_API_URL={address}: no Prefect server answers there") as caught:
        api.check_api()
    assert "\n" not in str(caught.value)


def test_the_password_is_in_a_file_of_the_user_alone_while_the_server_runs(home: Path) -> None:
    api.check_home()
    assert stat.S_IMODE(home.stat().st_mode) == 0o700
    left = api.password_file(4200)
    left.parent.mkdir()
    left.write_text("of a killed one")
    left.chmod(0o644)
    password = api.new_password()
    with api.kept_password(4200, password):
        assert stat.S_IMODE(left.stat().st_mode) == 0o600
        assert left.read_text() == password
    assert not left.exists()
    assert api.new_password() != password


def test_commands_find_the_password_of_the_server_that_they_use(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for port in (4200, 4300):
        api.password_file(port).parent.mkdir(parents=True, exist_ok=True)
        api.password_file(port).write_text(f"functa:{port}")
    assert api.password_of("http://127.0.0.1:4200/api") == "functa:4200"
    assert api.password_of("http://localhost:4300/api") == "functa:4300"
    assert api.password_of("http://127.0.0.1:4400/api") == ""
    assert api.password_of("https://elsewhere.example:4200/api") == "", "it is for this machine alone"
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:4300/api")
    api.prepare_environment()
    assert os.environ["PREFECT_API_AUTH_STRING"] == "functa:4300"


def test_the_users_own_password_is_for_the_server_that_the_user_names(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    api.password_file(4200).parent.mkdir(parents=True)
    api.password_file(4200).write_text("functa:4200")
    monkeypatch.setenv("PREFECT_API_AUTH_STRING", "admin:mine")
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:4200/api")
    assert api.password_of("http://127.0.0.1:4200/api") == "admin:mine"
    monkeypatch.setenv("PREFECT_API_URL", "https://elsewhere.example/api")
    assert api.password_of("https://elsewhere.example/api") == "admin:mine"
    assert api.password_of("http://127.0.0.1:4200/api") == "functa:4200"
