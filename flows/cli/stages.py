"""The command of each stage, made of its entry in the table of stages."""

import inspect
from collections.abc import Callable
from typing import Annotated

from cyclopts import Parameter

from functa.flows.cli.arguments import FromRoot, Overrides, Preset, Root
from functa.flows.config.digests import require_stage
from functa.flows.config.load import load_config
from functa.flows.config.schema import ConfigError, PipelineConfig
from functa.flows.ledger import Ledger
from functa.flows.server.console import print_line
from functa.tasks.stage_table import Stage

Keyword = inspect.Parameter.KEYWORD_ONLY


def stage_command(stage: Stage) -> Callable[..., int]:
    """Return the function behind `functa STAGE PRESET`."""

    def command(
        preset: str, *, overrides: list[str] | None = None, root: str | None = None, from_root: str | None = None,
        **options: bool,
    ) -> int:  # fmt: skip
        return _run_stage(stage, preset, overrides, root, from_root, options)

    optional = {"overrides": Overrides, "root": Root, "from_root": FromRoot}
    flags = {name: Annotated[bool, Parameter(help=option.help, negative="")] for name, option in stage.options.items()}
    command.__name__, command.__doc__ = stage.name, stage.summary
    command.__annotations__ = {"preset": Preset, **optional, **flags, "return": int}
    command.__signature__ = inspect.Signature(  # type: ignore[attr-defined]  # typeshed lacks it, cyclopts reads it
        [
            inspect.Parameter("preset", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=Preset),
            *(inspect.Parameter(name, Keyword, default=None, annotation=kind) for name, kind in optional.items()),
            *(inspect.Parameter(name, Keyword, default=False, annotation=kind) for name, kind in flags.items()),
        ],
        return_annotation=int,
    )
    return command


def config_and_root(preset: str, overrides: list[str] | None, root: str | None) -> tuple[PipelineConfig, str]:
    """Return the config, and the root that was named or the config's own."""
    config = load_config(preset, overrides)
    return config, root or f"./functa-runs/{config.name}"


def _run_stage(
    stage: Stage, preset: str, overrides: list[str] | None, root: str | None, from_root: str | None,
    options: dict[str, bool],
) -> int:  # fmt: skip
    chosen = {name: True for name, asked in options.items() if asked}
    if len([name for name in chosen if stage.options[name].again]) > 1:
        named = " and ".join(f"--{name.replace('_', '-')}" for name in chosen if stage.options[name].again)
        raise ConfigError(f"{named} are separate jobs: run one after the other")
    config, root = config_and_root(preset, overrides, root)
    require_stage(config, stage.name)
    ledger = Ledger(config, root, from_root)
    finished = None if chosen else ledger.current(stage.name, must_ask=True)
    if finished is not None:
        print_line(f"{stage.command} is up to date in {root}: nothing to do{ledger.newer_commit_note(finished)}")
        return 0
    if chosen:
        ledger.require_begun(stage.name)
    ledger.require_inputs(stage.name)
    call_flow(stage.name, config, root, from_root, **chosen)
    print_line(f"{stage.command}: done, in {root}")
    return 0


def call_flow(name: str, config: PipelineConfig, root: str, from_root: str | None, **options: bool) -> None:
    """Run the pipeline or one stage in this process, on the configured server or on Prefect's embedded one."""
    from functa.flows.config.preflight import preflight

    preflight(config, root, name)
    from functa.flows.server.session import prefect_session

    with prefect_session():
        _flow(name)(root, config=config, from_root=from_root, **options)


def _flow(name: str) -> Callable[..., object]:
    if name == "pipeline":
        from functa.flows.pipeline import pipeline

        return pipeline
    from functa.flows.stage_flow import load_stage

    return load_stage(name)
