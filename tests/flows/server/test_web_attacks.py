"""No page that the operator visits reads or changes anything at a server of ours, in Debian's chromium.

The same attacks on a server without a password succeed, which shows that they would be seen.
"""

import contextlib
import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml

from functa.flows.server.api import PASSWORD, SERVER_PASSWORD, healthy, local_api
from functa.flows.server.local_workers import PREFECT
from tests.helpers.flows.browser import chromium, text_of
from tests.helpers.flows.hostile_page import ATTACK, PageServer
from tests.helpers.flows.prefect_server import PROJECT, ask, clean_environment, eventually, free_port, serving

pytestmark = [
    pytest.mark.browser, pytest.mark.server, pytest.mark.slow, pytest.mark.attacks, pytest.mark.timeout(600)
]  # fmt: skip

EVIL = "evil.example"
COMPOSE = "admin:secret"  # what deploy/.env would hold
REBINDING = "127.0.0.2"  # where that name leads: another address of this machine, so that the port can be the same
EMBEDDED = """
import sys
from functa.flows.server.session import prefect_session
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL
with prefect_session():
    print(PREFECT_API_URL.value(), PREFECT_API_AUTH_STRING.value(), flush=True)
    sys.stdin.read()
"""


@dataclass(frozen=True)
class Target:
    """A server with a flow and a deployment. link: what lets a browser in, where there is such a thing."""

    port: int
    password: str
    flow: str
    deployment: str
    link: str = ""

    def ask(self, path: str, body: dict[str, Any]) -> Any:
        return ask(f"http://127.0.0.1:{self.port}", self.password, path, body)

    def state(self) -> dict[str, Any]:
        """Return what an attack would change."""
        around = timedelta(days=1)
        now = datetime.now(UTC)
        period = {"since": (now - around).isoformat(), "until": (now + around).isoformat()}
        forged = {"filter": {"occurred": period, "event": {"name": ["functa.images.arrived"]}}}
        of_ours = {"flow_runs": {"deployment_id": {"any_": [self.deployment]}}}
        return {
            "flows": {each["name"] for each in self.ask("flows/filter", {})},
            "deployments": {each["name"] for each in self.ask("deployments/filter", {})},
            "runs": len(self.ask("flow_runs/filter", of_ours)),
            "forged events": self.ask("events/filter", forged)["total"],
        }


def target(port: int, password: str, link: str = "") -> Target:
    """Create the flow and the deployment that the attacks go for."""
    address = f"http://127.0.0.1:{port}"
    flow = ask(address, password, "flows/", {"name": "victim"})["id"]
    deployment = ask(address, password, "deployments/", {"name": "victim", "flow_id": flow})["id"]
    return Target(port, password, flow, deployment, link)


@contextlib.contextmanager
def embedded(folder: Path) -> Iterator[Target]:
    """Run the server of `functa run`."""
    process = subprocess.Popen(
        [sys.executable, "-c", EMBEDDED], cwd=PROJECT, env=clean_environment(folder / "home"),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        api, password = process.stdout.readline().split()
        yield target(int(api.removesuffix("/api").rpartition(":")[2]), password)
    finally:
        process.communicate(timeout=60)


@contextlib.contextmanager
def prefects_own(folder: Path, password: str) -> Iterator[Target]:
    """Run the server as deploy/compose.yaml does, but for database and broker, which are not here."""
    described = yaml.safe_load((PROJECT / "deploy" / "compose.yaml").read_text())["services"]["server"]
    assert SERVER_PASSWORD in described["environment"]
    apart = ("DATABASE", "EVENTS", "REDIS", "DOCKET", "LEASE", "CLEANUP", SERVER_PASSWORD)
    settings = {k: v for k, v in described["environment"].items() if not any(part in k for part in apart)}
    port = free_port()
    settings["PREFECT_SERVER_UI_API_URL"] = local_api(port)
    if password:
        settings[SERVER_PASSWORD] = password
    arguments = ["127.0.0.1" if each == "0.0.0.0" else str(port) if each == "4200" else each
                 for each in described["command"][1:] if each != "--no-services"]  # fmt: skip
    process = subprocess.Popen(
        [*PREFECT, *arguments], env=clean_environment(folder / "home") | settings, cwd=folder,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        eventually(lambda: healthy(local_api(port)), 120, "the server answers")
        yield target(port, password)
    finally:
        process.terminate()
        process.wait(60)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium(f"--host-resolver-rules=MAP {EVIL} {REBINDING}") as driver:
        driver.set_script_timeout(60)
        yield driver


@pytest.fixture(scope="module")
def up(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    with serving(tmp_path_factory.mktemp("up")) as served:
        yield target(served.port, served.password, served.link)


@pytest.fixture(scope="module")
def run_server(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    with embedded(tmp_path_factory.mktemp("embedded")) as made:
        yield made


@pytest.fixture(scope="module")
def compose(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    with prefects_own(tmp_path_factory.mktemp("compose"), COMPOSE) as made:
        yield made


@pytest.fixture(params=["up", "run_server", "compose"])
def attacked(request: pytest.FixtureRequest) -> Target:
    found: Target = request.getfixturevalue(request.param)
    return found


@contextlib.contextmanager
def page_server(host: str, port: int = 0) -> Iterator[PageServer]:
    server = PageServer(host, port)
    try:
        yield server
    finally:
        server.close()


def attack(browser: Any, host: str, target: Target) -> list[str]:
    """Run the attack in the page that is open; return what it could read."""
    return list(browser.execute_async_script(ATTACK, host, target.flow, target.deployment))


def foreign_pages(browser: Any, target: Target) -> dict[str, list[str]]:
    """Attack from a page of another host, and from one of this machine at another port, to which cookies are sent."""
    read = {}
    for name, address in ((EVIL, REBINDING), ("127.0.0.1", "127.0.0.1")):
        with page_server(address) as server:
            browser.get(f"http://{name}:{server.port}/")
            assert "Kittens" in text_of(browser)
            read[name] = attack(browser, f"127.0.0.1:{target.port}", target)
    return read


def rebound(browser: Any, target: Target) -> list[str]:
    """Attack from a page whose host name is first that of its own server and then leads to ours, at the same port."""
    with page_server(REBINDING, target.port) as server:
        browser.get(f"http://{EVIL}:{target.port}/")
        assert "Kittens" in text_of(browser)
        server.forward_to = ("127.0.0.1", target.port)
        return attack(browser, f"{EVIL}:{target.port}", target)


def log_in(browser: Any, target: Target) -> None:
    browser.get(target.link)
    eventually(lambda: "token=" not in browser.current_url and "Runs" in text_of(browser), 60, "the UI opens")


def test_a_page_of_another_origin_reads_and_changes_nothing(browser: Any, attacked: Target) -> None:
    before = attacked.state()
    assert foreign_pages(browser, attacked) == {EVIL: [], "127.0.0.1": []}
    assert attacked.state() == before


def test_a_rebound_host_name_reads_and_changes_nothing(browser: Any, attacked: Target) -> None:
    before = attacked.state()
    read = rebound(browser, attacked)
    assert read == (["frame"] if attacked.password == COMPOSE else []), "Prefect's own server shows all its login page"
    assert attacked.state() == before


def test_nor_does_it_when_the_operator_is_logged_in(browser: Any, up: Target) -> None:
    log_in(browser, up)
    before = up.state()
    assert foreign_pages(browser, up) == {EVIL: [], "127.0.0.1": []}
    assert rebound(browser, up) == []
    assert up.state() == before
    browser.get(f"http://127.0.0.1:{up.port}/")
    assert "401" not in text_of(browser), "the operator is still logged in"


def test_all_of_it_succeeds_on_a_server_without_a_password(browser: Any, tmp_path: Path) -> None:
    """Else the tests above would prove nothing."""
    with prefects_own(tmp_path, "") as target:
        before = target.state()
        read = foreign_pages(browser, target)[EVIL]
        read_by_name = rebound(browser, target)
        eventually(lambda: target.state()["forged events"] >= 2, 30, "the forged events are in the server's database")
        after = target.state()
    assert any("auth_success" in each for each in read)
    assert any("prefect.flow" in each or "prefect-server" in each for each in (*read, *read_by_name))
    assert after["flows"] == before["flows"] | {"evil"}
    assert after["deployments"] == before["deployments"] | {"evil"}
    assert after["runs"] >= before["runs"] + 2


def test_without_the_link_there_is_a_page_that_names_it(browser: Any, up: Target) -> None:
    browser.execute_cdp_cmd("Network.clearBrowserCookies", {})
    for path in ("", "deployments", "ui-settings", "docs", "?token=", "?token=wrong"):
        browser.get(f"http://127.0.0.1:{up.port}/{path}")
        assert "Open the link that functa up printed" in text_of(browser)


def test_the_link_opens_the_ui_also_at_a_forwarded_port(browser: Any, up: Target) -> None:
    """Through ssh the port of the browser is another one."""
    browser.execute_cdp_cmd("Network.clearBrowserCookies", {})
    with page_server("127.0.0.1") as forwarder:
        forwarder.forward_to = ("127.0.0.1", up.port)
        for port in (up.port, forwarder.port):
            browser.get(up.link.replace(f":{up.port}", f":{port}"))
            eventually(lambda: "token=" not in browser.current_url, 30, "the link leads on")
            browser.get(f"http://127.0.0.1:{port}/deployments")
            eventually(lambda: "pipeline" in text_of(browser), 60, f"the UI shows deployments at port {port}")
            assert "password" not in text_of(browser).lower()
            browser.get(f"http://127.0.0.1:{port}/v2/deployments")  # the UI of the link "Switch to V2 UI"
            eventually(lambda: "re-encode" in text_of(browser), 60, f"its other version too, at port {port}")
            if folder := os.environ.get("FUNCTA_SCREENSHOTS"):
                Path(folder).mkdir(parents=True, exist_ok=True)
                browser.save_screenshot(str(Path(folder, f"link-{'own' if port == up.port else 'forwarded'}.png")))
            cookies = browser.get_cookies()
            (cookie,) = (each for each in cookies if each["name"] == f"functa-{up.port}")
            assert (cookie["httpOnly"], cookie["sameSite"]) == (True, "Strict")
            stored = browser.execute_script("return JSON.stringify([document.cookie, {...localStorage}])")
            assert cookie["value"] not in stored
            browser.execute_cdp_cmd("Network.clearBrowserCookies", {})


def test_other_users_and_programs_without_the_password_are_refused(up: Target) -> None:
    for password in ("", "functa:wrong", PASSWORD):
        with pytest.raises(urllib.error.HTTPError, match="401"):
            ask(f"http://127.0.0.1:{up.port}", password, "flows/filter", {})
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"http://127.0.0.1:{up.port}/")
