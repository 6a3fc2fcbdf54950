"""The `functa` command. Exit status: 0 done, 2 wrong arguments or config, 1 anything else, such as a missing file."""

import io
import json
import os
import signal
import sys
import traceback
from collections.abc import Iterable
from contextlib import suppress
from typing import Annotated

from cyclopts import (
    App,
    CycloptsError,
    MissingArgumentError,
    Parameter,
    UnknownOptionError,
    UnusedCliTokensError,
)

from functa import __version__
from functa.flows.cli.arguments import (
    LOOK,
    OPERATE,
    RUN,
    USE,
    Deployment,
    FromRoot,
    Json,
    Overrides,
    Preset,
    Root,
    whole,
)
from functa.flows.cli.compare import compare, table
from functa.flows.cli.models import classify, decode, encode_command, sample
from functa.flows.cli.stages import call_flow, config_and_root, stage_command
from functa.flows.cli.stores.publish import export, fetch
from functa.flows.cli.stores.store import store
from functa.flows.cli.sweep import sweep
from functa.flows.config.explain import keys_by_name, suggest_key
from functa.flows.config.load import load_config
from functa.flows.config.schema import PipelineConfig
from functa.flows.ledger import Ledger
from functa.flows.server.console import print_line
from functa.storage.errors import FunctaError, StorageError, one_line
from functa.tasks.dispatch.child import SPIN
from functa.tasks.stage_table import STAGES

app = App(
    name="functa",
    help="Spatial functa: meta-train a neural field, encode images into latents, learn on them, measure.",
    help_format="plaintext",
    version=__version__,
    version_flags=["--version"],
    suppress_keyboard_interrupt=False,  # or cyclopts exits before _guarded shows how to continue
)

app.command(store)
app.command(compare, group=LOOK)
app.command(table, group=LOOK)
app.command(sweep, group=RUN)

for command in (decode, sample, classify, export, fetch):
    app.command(command, group=USE)

for stage in STAGES.values():
    made = encode_command(stage) if stage.name == "encode" else stage_command(stage)
    app.command(made, name=stage.command, group=RUN)


def main() -> None:
    """Entry point: every error is one line; a traceback only with --debug."""
    arguments = sys.argv[1:]
    debug = "--debug" in arguments
    if debug:
        arguments.remove("--debug")
        os.environ["FUNCTA_DEBUG"] = "1"
    for name, value in SPIN.items():
        os.environ.setdefault(name, value)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal that lacks a character still gets the line
    sys.exit(_guarded(arguments, debug))


def _guarded(arguments: list[str], debug: bool) -> int:
    try:
        result = app(arguments, exit_on_error=False, print_error=False, result_action="return_value")
        return result if isinstance(result, int) else 0
    except KeyboardInterrupt:
        print("functa: interrupted; the same command continues where this one stopped", file=sys.stderr)
        return 130
    except SystemExit as error:
        if error.code == 128 + signal.SIGTERM:
            print("functa: ended by SIGTERM; the same command continues where this one stopped", file=sys.stderr)
        raise
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if debug:
            traceback.print_exc()
        print_line(f"functa: {_message(error, debug)}", error=True)
        return 2 if isinstance(error, CycloptsError) else error.exit_status if isinstance(error, FunctaError) else 1


def _message(error: Exception, debug: bool) -> str:
    if isinstance(error, FunctaError):
        return str(error)
    if isinstance(error, CycloptsError):
        found = _setting_as_option(error) or _missing(error) or _unused(error)
        return found or f"{one_line(error)} (functa --help)"
    return f"{type(error).__name__}: {' '.join(str(error).split())}" + ("" if debug else " (--debug shows where)")


def _setting_as_option(error: CycloptsError) -> str:
    """Return how to set a setting that was given as an option of its own, or an empty string for other faults."""
    if not isinstance(error, UnknownOptionError) or not any(
        "--set" in each.names for each in error.argument_collection
    ):
        return ""
    option = (error.token.keyword or error.token.value).partition("=")[0]
    keys = keys_by_name().get(option.lstrip("-").replace("-", "_"), [])
    if not keys:
        return ""
    others = f" (or {', '.join(keys[1:4])}{', ...' if keys[4:] else ''})" if keys[1:] else ""
    return f"unknown option {option}: use --set {keys[0]}=VALUE{others}"


def _missing(error: CycloptsError) -> str:
    """Return which argument by position is missing and what it is, or an empty string for other faults."""
    missing = error.argument if isinstance(error, MissingArgumentError) else None
    if missing is None or missing.index is None:
        return ""
    command, name = " ".join(error.command_chain or ()), missing.name.lstrip("-").upper()
    about = (missing.parameter.help or "").rstrip(".")
    return f"{command} needs {name}: {about[:1].lower()}{about[1:]} (functa {command} --help)"


def _unused(error: CycloptsError) -> str:
    """Return what an argument that the command does not take may mean, or an empty string for other faults."""
    if not isinstance(error, UnusedCliTokensError) or not error.unused_tokens:
        return ""
    chain, first = error.command_chain or (), error.unused_tokens[0]
    key, equals, _ = first.partition("=")
    words = [word for word in error.root_input_tokens or () if word.removeprefix("--set=").startswith(f"{key}=")]
    if equals and len(words) > 1 and _takes_settings(chain):
        return (
            f"unexpected argument {first}: {key} is given {len(words)} times; where the shell made several words of a "
            f"pattern in braces, quote it: --set '{key}=.../{{000..127}}.tar'"
        )
    known = {name for names in keys_by_name().values() for name in names}
    if equals and (key in known or suggest_key(key)) and _takes_settings(chain):
        return f"unexpected argument {first}: did you mean --set {first}?"
    return f"unexpected argument {first} (functa {' '.join([*chain, '--help'])})"


def _takes_settings(chain: Iterable[str]) -> bool:
    command = app
    for name in chain:
        command = command[name]
    return any("--set" in argument.names for argument in command.assemble_argument_collection())


@app.command(group=RUN, sort_key=0)
def run(
    preset: Preset,
    *,
    overrides: Overrides = None,
    root: Root = None,
    from_root: FromRoot = None,
    deployment: Deployment = False,
) -> int:
    """Run the whole pipeline; finished stages are skipped.

    Without a Prefect API in environment or profile it runs on Prefect's embedded server.
    """
    config, root = config_and_root(preset, overrides, root)
    ledger = Ledger(config, root, from_root)
    if ledger.all_up_to_date():
        return _finish(ledger, "everything is up to date: nothing to do", gated=True)
    if deployment:
        return _run_deployed(config, root, from_root)
    call_flow("pipeline", config, root, from_root)
    return _finish(ledger, "done")


def _run_deployed(config: PipelineConfig, root: str, from_root: str | None) -> int:
    from functa.flows.server.deployed import run_deployed

    state = run_deployed(config, root, from_root)
    if not state.is_completed():
        return 1
    with suppress(StorageError):  # a root that the workers alone can reach
        ledger = Ledger(config, root)
        if ledger.up_to_date("evaluate") is not None:
            return _finish(ledger, "done")
    return 0


def _finish(ledger: Ledger, outcome: str, gated: bool = False) -> int:
    from functa.flows.cli.tables import print_summary

    print_summary(ledger, outcome)
    if gated:
        from functa.flows.gate import check_gate

        check_gate(ledger)
    return 0


@app.command(group=LOOK)
def presets(*, as_json: Json = False) -> int:
    """List the presets: data, size, latent, time, purpose; with --json parameter counts too."""
    from functa.flows.cli.presets import list_presets, print_presets

    described = list_presets(parameters=as_json)
    if as_json:
        print(json.dumps(described, indent=1))
    else:
        print_presets(described)
    return 0


@app.command(group=LOOK)
def fields(
    name: Annotated[str | None, Parameter(help="Show the whole card of this one.")] = None, *, as_json: Json = False
) -> int:
    """List the ready-made fields, which encode images of any size without any training."""
    from functa.flows.cli.presets import describe_fields, print_fields

    described = describe_fields(name)
    if as_json:
        print(json.dumps(described if name is None else described[0], indent=1))
    else:
        print_fields(described, whole=name is not None)
    return 0


@app.command(group=LOOK)
def show(
    preset: Preset,
    *,
    overrides: Overrides = None,
    everything: Annotated[
        bool, Parameter(name="--all", help="Show every setting, not the main ones.", negative="")
    ] = False,
    as_json: Json = False,
) -> int:
    """Show what a run will cost in time, memory and bytes, and the main settings."""
    from functa.flows.cli.show import describe_run, print_run
    from functa.flows.config.preflight import check_models

    config = load_config(preset, overrides)
    check_models(config, "pipeline")
    described = describe_run(config)
    if as_json:
        print(json.dumps(described, indent=1))
    else:
        print_run(described, everything)
    return 0


@app.command(group=LOOK)
def status(root: Annotated[str, Parameter(help="A run's root.")], *, as_json: Json = False) -> int:
    """Show the state of each stage, and how many images are encoded; needs no server."""
    from functa.flows.cli.status import print_status, read_status

    found = read_status(root)
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        print_status(root, found)
    return 0


@app.command(group=OPERATE)
def up(
    *,
    port: Annotated[int, Parameter(converter=whole, help="Port of server and UI on 127.0.0.1.")] = 4200,
    root: Annotated[str | None, Parameter(help="Root of runs whose form names no other.")] = None,
    gpus: Annotated[
        int | None,
        Parameter(converter=whole, help="Workers with a device each; default: the GPUs of this machine, or 1."),
    ] = None,
    cron: Annotated[
        str | None, Parameter(help="When to look for new images of that root, in UTC; default: every night at 3.")
    ] = None,
    open_browser: Annotated[bool, Parameter(name="--open", help="Open the UI.", negative="")] = False,
) -> int:
    """Start Prefect's server, workers and deployments on this machine, until Ctrl-C."""
    from functa.flows.server.up import up as serve

    serve(port, root, open_browser, gpus=gpus, cron=cron)
    return 0


@app.command(group=OPERATE)
def notify(
    root: Annotated[str, Parameter(help="A root whose functaset is to be kept up to date.")],
    *,
    images: Annotated[str, Parameter(help="Where images arrived: the root's images.location, or a folder in it.")],
) -> int:
    """Notify the Prefect server of new images: it runs the deployment re-encode for this root."""
    from functa.flows.cli.notify import EVENT
    from functa.flows.cli.notify import notify as emit

    api = emit(root, images)
    print_line(f"{EVENT}: sent to {api}, which runs deployment re-encode for {root}")
    return 0


@app.command(group=OPERATE)
def doctor(*, root: Annotated[str, Parameter(help="Folder of future runs.")] = "functa-runs") -> int:
    """Check this machine: what is installed, what is missing, and how to fix it. Status 1 if anything must be fixed."""
    from functa.flows.server.doctor import doctor as check
    from functa.flows.server.doctor import print_checks

    checks = check(root)
    print_checks(checks)
    return 1 if any(c.ok is False for c in checks) else 0
