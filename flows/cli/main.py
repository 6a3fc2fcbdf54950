"""The `functa` command. Exit status 0 done, 2 wrong from arguments and config alone, 1 something in the world."""

import json
import os
import sys
import traceback
from contextlib import suppress
from typing import Annotated

from cyclopts import App, CycloptsError, Parameter

from functa.flows.cli.arguments import FromRoot, Json, Overrides, Preset, Root, whole
from functa.flows.cli.compare import compare
from functa.flows.cli.models import classify, decode, sample
from functa.flows.cli.store import store
from functa.flows.cli.sweep import sweep
from functa.flows.config.digests import require_stage
from functa.flows.config.load import load_config
from functa.flows.config.schema import ConfigError, PipelineConfig
from functa.flows.ledger import Ledger
from functa.storage.errors import FunctaError, StorageError, one_line

app = App(
    name="functa",
    help="Spatial functa: meta-train a field, encode images into latents, learn on them, measure.",
    version="0.1.0",
    version_flags=["--version"],
    suppress_keyboard_interrupt=False,  # or cyclopts exits before _guarded has said how to go on
)

app.command(store)

for command in (decode, sample, classify, sweep, compare):
    app.command(command)


def main() -> None:
    """Entry point: every error is one line; a traceback only with --debug."""
    arguments = sys.argv[1:]
    debug = "--debug" in arguments
    if debug:
        arguments.remove("--debug")
        os.environ["FUNCTA_DEBUG"] = "1"
    sys.exit(_guarded(arguments, debug))


def _guarded(arguments: list[str], debug: bool) -> int:
    try:
        result = app(arguments, exit_on_error=False, print_error=False, result_action="return_value")
        return result if isinstance(result, int) else 0
    except KeyboardInterrupt:
        print("functa: interrupted; the same command continues where this one stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if debug:
            traceback.print_exc()
        print(f"functa: {_message(error, debug)}", file=sys.stderr)
        return 2 if isinstance(error, CycloptsError) else error.exit_status if isinstance(error, FunctaError) else 1


def _message(error: Exception, debug: bool) -> str:
    if isinstance(error, FunctaError):
        return str(error)
    if isinstance(error, CycloptsError):
        return f"{one_line(error)} (functa --help)"
    return f"{type(error).__name__}: {' '.join(str(error).split())}" + ("" if debug else " (--debug shows where)")


def _config(preset: str, overrides: list[str] | None, root: str | None) -> tuple[PipelineConfig, str]:
    config = load_config(preset, overrides)
    return config, root or f"./functa-runs/{config.name}"


@app.command
def run(
    preset: Preset,
    *,
    overrides: Overrides = None,
    root: Root = None,
    from_root: FromRoot = None,
    deployment: Annotated[bool, Parameter(help="On the workers of a running server.", negative="")] = False,
) -> int:
    """Run the whole pipeline: what stands already is not done again.

    With no Prefect API in environment or profile it runs on Prefect's embedded server.
    """
    config, place = _config(preset, overrides, root)
    ledger = Ledger(config, place, from_root)
    if ledger.all_standing():
        return _tell(ledger, "everything stands already: nothing to do", gated=True)
    if deployment:
        return _run_deployed(config, place, from_root)
    _call_flow("pipeline", config, place, from_root)
    return _tell(ledger, "done")


def _run_deployed(config: PipelineConfig, root: str, from_root: str | None) -> int:
    from functa.flows.server.deployed import run_deployed

    state = run_deployed(config, root, from_root)
    if not state.is_completed():
        return 1
    with suppress(StorageError):  # a root that the workers alone can reach
        ledger = Ledger(config, root)
        if ledger.standing("evaluate") is not None:
            return _tell(ledger, "done")
    return 0


def _call_flow(name: str, config: PipelineConfig, root: str, from_root: str | None, **how: bool) -> None:
    from functa.flows.config.preflight import preflight

    preflight(config, root, name)
    from functa.flows.server.api import prepare_environment

    prepare_environment()
    from functa.flows.cli.progress import quiet_tracebacks

    quiet_tracebacks()
    from functa.flows.server.embedded import embedded_server

    with embedded_server():
        if name == "pipeline":
            from functa.flows.pipeline import pipeline

            pipeline(root, config=config, from_root=from_root)
        else:
            from functa.flows import stages

            getattr(stages, name)(root, config=config, from_root=from_root, **how)


def _tell(ledger: Ledger, word: str, gated: bool = False) -> int:
    from functa.flows.cli.tables import print_summary

    print_summary(ledger, word)
    if gated:
        from functa.flows.gate import check_gate

        check_gate(ledger)
    return 0


def _stage(
    stage: str, preset: str, overrides: list[str] | None, root: str | None, from_root: str | None, **how: bool
) -> int:
    config, place = _config(preset, overrides, root)
    require_stage(config, stage)
    ledger = Ledger(config, place, from_root)
    how = {name: True for name, asked in how.items() if asked}
    standing = None if how else ledger.current(stage, must_ask=True)
    if standing is not None:
        print(f"{stage.replace('_', '-')} stands already in {place}: nothing to do{ledger.outrun(standing)}")
        return 0
    if how:
        ledger.require_begun(stage)
    ledger.require_inputs(stage)
    _call_flow(stage, config, place, from_root, **how)
    print(f"{stage.replace('_', '-')}: done, in {place}")
    return 0


@app.command
def meta_train(preset: Preset, *, overrides: Overrides = None, root: Root = None, from_root: FromRoot = None) -> int:
    """Meta-train the field."""
    return _stage("meta_train", preset, overrides, root, from_root)


@app.command
def encode(
    preset: Preset,
    *,
    overrides: Overrides = None,
    root: Root = None,
    from_root: FromRoot = None,
    retry_bad: Annotated[bool, Parameter(help="Try images again that could not be encoded.", negative="")] = False,
    repair: Annotated[bool, Parameter(help="Encode the images of damaged shards again.", negative="")] = False,
    retire_lost: Annotated[
        bool,
        Parameter(
            help="Retire the rows of images that are gone, however many; with --repair of changed ones too.",
            negative="",
        ),
    ] = False,
) -> int:
    """Encode every image into the functaset; run again: new, changed and gone images alone."""
    if retry_bad and repair:
        raise ConfigError("--retry-bad and --repair are two things: one after the other")
    how = {"retry_bad": retry_bad, "repair": repair, "retire_lost": retire_lost}
    return _stage("encode", preset, overrides, root, from_root, **how)


@app.command
def train_classifier(
    preset: Preset, *, overrides: Overrides = None, root: Root = None, from_root: FromRoot = None
) -> int:
    """Train the classifier on latents."""
    return _stage("train_classifier", preset, overrides, root, from_root)


@app.command
def train_diffusion(
    preset: Preset, *, overrides: Overrides = None, root: Root = None, from_root: FromRoot = None
) -> int:
    """Train the diffusion model on latents."""
    return _stage("train_diffusion", preset, overrides, root, from_root)


@app.command
def evaluate(preset: Preset, *, overrides: Overrides = None, root: Root = None, from_root: FromRoot = None) -> int:
    """Measure what stands, and write the report."""
    return _stage("evaluate", preset, overrides, root, from_root)


@app.command
def presets(*, as_json: Json = False) -> int:
    """List the presets: data, size, latent, time, purpose; with --json parameter counts too."""
    from functa.flows.cli.presets import list_presets, print_presets

    described = list_presets(parameters=as_json)
    if as_json:
        print(json.dumps(described, indent=1))
    else:
        print_presets(described)
    return 0


@app.command
def show(preset: Preset, *, overrides: Overrides = None, as_json: Json = False) -> int:
    """The resolved config, digests, parameter counts, estimated work, memory and bytes."""
    from functa.flows.cli.show import describe_run, print_run
    from functa.flows.config.preflight import check_models

    config = load_config(preset, overrides)
    check_models(config, "pipeline")
    described = describe_run(config)
    if as_json:
        print(json.dumps(described, indent=1))
    else:
        print_run(described)
    return 0


@app.command
def status(root: Annotated[str, Parameter(help="A run's root.")], *, as_json: Json = False) -> int:
    """Stages and shards done, left and bad; images/s. From records and receipts alone, no server needed."""
    from functa.flows.cli.status import print_status, read_status

    told = read_status(root)
    if as_json:
        print(json.dumps(told, indent=1))
    else:
        print_status(root, told)
    return 0


@app.command
def up(
    *,
    port: Annotated[int, Parameter(converter=whole, help="Port of server and UI on 127.0.0.1.")] = 4200,
    root: Annotated[str | None, Parameter(help="Where runs go unless the form says otherwise.")] = None,
    gpus: Annotated[
        int | None,
        Parameter(converter=whole, help="Workers with a device each; default: the GPUs of this machine, or 1."),
    ] = None,
    cron: Annotated[
        str | None, Parameter(help="When to look for new images of that root, in UTC; default: every night at 3.")
    ] = None,
    open_browser: Annotated[bool, Parameter(name="--open", help="Open the UI.", negative="")] = False,
) -> int:
    """Prefect server, work pool, workers and the deployments on this machine, until Ctrl-C."""
    from functa.flows.server.up import up as serve

    serve(port, root, open_browser, gpus=gpus, cron=cron)
    return 0


@app.command
def notify(
    root: Annotated[str, Parameter(help="A root whose functaset is to be kept up to date.")],
    *,
    images: Annotated[str, Parameter(help="Where images arrived: its source, or a place below it.")],
) -> int:
    """Tell the Prefect server that images arrived: it runs the deployment re-encode for this root."""
    from functa.flows.cli.notify import EVENT
    from functa.flows.cli.notify import notify as tell

    api = tell(root, images)
    print(f"{EVENT}: told {api}, which runs deployment re-encode for {root}")
    return 0


@app.command
def doctor(*, root: Annotated[str, Parameter(help="Where runs would go.")] = "functa-runs") -> int:
    """Check this machine: what is there, what is missing, and how to mend it. Status 1 if something must be mended."""
    from functa.flows.server.doctor import doctor as check
    from functa.flows.server.doctor import print_checks

    checks = check(root)
    print_checks(checks)
    return 1 if any(c.ok is False for c in checks) else 0
