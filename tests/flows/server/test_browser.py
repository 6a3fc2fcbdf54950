"""The pages that an operator sees, in Debian's chromium: the run's page, its artifacts and the run form.

Screenshots go to the folder $FUNCTA_SCREENSHOTS, where it is set.
"""

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from functa.flows.config.load import load_config
from functa.flows.config.schema import PipelineConfig
from functa.tasks.stage_table import STAGES
from tests.helpers.flows.browser import chromium, text_of
from tests.helpers.flows.prefect_server import PROJECT, Served, eventually, serving
from tests.helpers.flows.tiny_config import TINY

pytestmark = [
    pytest.mark.browser,
    pytest.mark.server,
    pytest.mark.slow,
    pytest.mark.timeout(1200),
]

ARTIFACTS = ["metrics", "lineage", "reconstructions", "samples", "report"]
RUN = """
import sys
from functa.flows.config.load import load_config
from functa.flows.server.deployed import run_deployed
state = run_deployed(load_config("digits", sys.argv[2:]), sys.argv[1])
sys.exit(not state.is_completed())
"""


@pytest.fixture(scope="module")
def served(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("up")) as running:
        browser.get(running.link)
        yield running


@pytest.fixture(scope="module")
def page(served: Served) -> str:
    """Return the address that `functa run --deployment` prints, once the pipeline has run on the worker."""
    command = [sys.executable, "-c", RUN, f"{served.root}-tiny", *TINY]
    done = subprocess.run(command, cwd=PROJECT, env=served.environment(), capture_output=True, text=True, timeout=600)
    log = served.home / "functa" / f"worker-gpu-0-{served.port}.log"
    assert done.returncode == 0, done.stdout + done.stderr + log.read_text()[-4000:]
    (address,) = re.findall(r"^Run 'pipeline digits': (http://\S+/flow-run/\S+)$", done.stdout, re.MULTILINE)
    return str(address)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as driver:
        yield driver


def at_rest(browser: Any) -> None:
    """Wait until the page has stopped growing: until then its buttons move."""
    size, since = None, time.monotonic()
    deadline = since + 60
    while time.monotonic() - since < 3:
        now = browser.execute_script("return [document.querySelectorAll('*').length, document.body.scrollHeight]")
        if now != size:
            size, since = now, time.monotonic()
        assert since < deadline, f"{browser.current_url} does not come to rest"
        time.sleep(0.2)


def press(browser: Any, label: str) -> None:
    """Click on the button with this label."""
    (button,) = (b for b in browser.find_elements("tag name", "button") if b.text.strip() == label)
    browser.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", button)
    button.click()


def shown(browser: Any, wanted: list[str], name: str, height: int = 1200) -> str:
    """Wait until the page shows all the words, and keep a screenshot."""

    def missing() -> list[str]:
        text = text_of(browser)
        return [words for words in wanted if words not in text]

    try:
        eventually(lambda: not missing(), 60, f"{name} shows {wanted}")
    except AssertionError:
        pytest.fail(f"{browser.current_url} does not show {missing()}; it shows: {text_of(browser)[:3000]}")
    if folder := os.environ.get("FUNCTA_SCREENSHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        browser.set_window_size(1500, height)
        browser.save_screenshot(str(Path(folder, f"{name}.png")))
        browser.set_window_size(1500, 1200)
        phone = {"width": 390, "height": 1600, "deviceScaleFactor": 1, "mobile": True}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
        browser.save_screenshot(str(Path(folder, f"{name}-phone.png")))
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    return text_of(browser)


def stage_runs(served: Served) -> dict[str, dict[str, Any]]:
    """Return child runs by the name of their stage."""
    flows = {flow["id"]: flow["name"] for flow in served.ask("flows/filter", {})}
    return {flows[run["flow_id"]]: run for run in served.ask("flow_runs/filter", {"sort": "START_TIME_ASC"})}


def test_the_run_page_shows_every_stage_as_completed(browser: Any, page: str) -> None:
    browser.get(page)
    shown(browser, ["pipeline digits", "Completed", "Work Queue cpu", "5 Task runs"], "run")
    browser.get(f"{page}?tab=SubflowRuns")
    stages = [stage.replace("_", "-") for stage in STAGES]
    text = shown(browser, ["5 Subflow runs", *(f"{stage} digits" for stage in stages)], "run-stages", 1600)
    assert text.count("Completed") >= 1 + len(stages)
    assert text.count("Work Queue gpu") == len(stages)


def test_the_pipelines_own_page_shows_the_runs_artifacts(browser: Any, page: str) -> None:
    """An operator looks there first, and need not find the stage that made them."""
    browser.get(f"{page}?tab=Artifacts")
    shown(browser, ["pipeline digits", *ARTIFACTS], "artifacts-pipeline", 2400)


def test_every_stages_run_page_shows_its_artifacts(browser: Any, served: Served, page: str) -> None:
    runs = stage_runs(served)
    base = page.rsplit("/", 1)[0]
    artifacts = {
        "meta-train": ["meta-train-progress"],
        "encode": ["encode-progress", "functaset"],
        "train-classifier": ["classifier-progress"],
        "train-diffusion": ["diffusion-progress"],
        "evaluate": ARTIFACTS,
    }
    for stage, keys in artifacts.items():
        browser.get(f"{base}/{runs[stage]['id']}?tab=Artifacts")
        shown(browser, [f"{stage} digits", *keys], f"artifacts-{stage}")


@pytest.mark.parametrize(
    ("key", "wanted"),
    [("metrics", ["PSNR, test", "dB"]), ("lineage", ["functaset", "field"]), ("reconstructions", []), ("samples", [])],
)
def test_artifacts_render(browser: Any, served: Served, page: str, key: str, wanted: list[str]) -> None:
    (artifact, *_) = served.ask("artifacts/filter", {"artifacts": {"key": {"any_": [key]}}})
    browser.get(f"{page.split('/runs/')[0]}/artifacts/artifact/{artifact['id']}")
    shown(browser, [key, *wanted], f"artifact-{key}")
    if not wanted:  # pictures: all of them decoded
        widths = browser.execute_script("return [...document.querySelectorAll('img')].map(i => i.naturalWidth)")
        assert widths
        assert min(widths) > 1


def test_the_automations_page_shows_the_watch_and_the_trigger(browser: Any, page: str) -> None:
    from functa.deploy.bootstrap import WATCH

    browser.get(f"{page.split('/runs/')[0]}/automations")
    shown(browser, [WATCH, "re-encode when images arrive"], "automations")


def test_the_deployments_page_shows_every_stage_and_the_schedule(browser: Any, page: str) -> None:
    browser.get(f"{page.split('/runs/')[0]}/deployments")
    names = [stage.replace("_", "-") for stage in STAGES]
    shown(browser, [*names, "pipeline", "re-encode", "At 03:00 AM"], "deployments", 1600)


def descriptions(schema: dict[str, Any]) -> list[str]:
    """Return every description of every field, sections' included."""
    models = [schema, *schema.get("$defs", {}).values()]
    fields = [field for model in models for field in model.get("properties", {}).values()]
    return sorted({" ".join(field["description"].split()) for field in fields if "description" in field})


def test_the_run_form_shows_every_field_with_its_description_and_default(
    browser: Any, served: Served, page: str
) -> None:
    (deployment,) = (d for d in served.ask("deployments/filter", {}) if d["name"] == "pipeline")
    browser.get(f"{page.split('/runs/')[0]}/deployments/deployment/{deployment['id']}/run")
    titles = [str(field.title) for field in PipelineConfig.model_fields.values() if field.title]
    assert len(titles) >= 9
    parameters = deployment["parameter_openapi_schema"]["properties"]
    assert min(parameters, key=lambda name: parameters[name]["position"]) == "root"
    described = [" ".join(parameter["description"].split()) for parameter in parameters.values()]
    assert described[0].startswith("Folder or s3://bucket/prefix of the run.")
    schema = PipelineConfig.model_json_schema()
    text = shown(browser, [*titles, *described, *descriptions(schema), "Submit"], "form", 9200)
    assert not [name for name in schema["$defs"] if name in text], "a box is titled by its class"
    values = browser.execute_script("return [...document.querySelectorAll('input, textarea')].map(e => e.value)")
    assert str(served.root) in values
    assert str(load_config("digits").meta_train.steps) in values


def test_the_pages_send_no_telemetry(browser: Any, page: str) -> None:
    """The v2 UI asks Amplitude for a configuration whatever is set, but it may not send anything."""
    browser.get(page)
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    requests = [m["params"]["request"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    sent = [r["url"] for r in requests if r["method"] != "GET" and urlsplit(r["url"]).hostname != "127.0.0.1"]
    assert requests
    assert not sent


def test_submitting_the_run_form_as_it_is_runs_the_pipeline_on_the_workers(
    browser: Any, served: Served, page: str
) -> None:
    (deployment,) = (d for d in served.ask("deployments/filter", {}) if d["name"] == "pipeline")
    browser.get(f"{page.split('/runs/')[0]}/deployments/deployment/{deployment['id']}/run")
    shown(browser, ["Folder or s3://bucket/prefix of the run.", "Submit"], "form-top")
    at_rest(browser)

    def of_deployment() -> Any:
        return served.ask("flow_runs/filter", {"flow_runs": {"deployment_id": {"any_": [deployment["id"]]}}})

    def runs() -> Any:
        return [run for run in of_deployment() if run["id"] not in before]

    before = {run["id"] for run in of_deployment()}
    for _ in range(3):  # a person whose press did nothing presses again; two runs would fail below
        press(browser, "Submit")
        with contextlib.suppress(AssertionError):
            eventually(runs, 20, "the form has made a run")
            break
    else:
        pytest.fail(f"Submit makes no run; {browser.current_url} shows: {text_of(browser)[-3000:]}")
    eventually(lambda: runs()[0]["state_type"] != "SCHEDULED", 120, "a worker has taken the form's run")
    (run,) = runs()
    sent, prefilled = (PipelineConfig.model_validate(row["parameters"]["config"]) for row in (run, deployment))
    assert sent == prefilled
    assert run["parameters"]["root"] == str(served.root)
    eventually(lambda: served.ask(f"flow_runs/{run['id']}")["state_type"] == "COMPLETED", 800, "the pipeline has run")
    assert json.loads((served.root / "metrics.json").read_text())["psnr_test"] > 25
