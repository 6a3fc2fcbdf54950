"""`functa sweep` and `functa compare`: many runs of one preset, and the figures of several runs side by side."""

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter, validators

from functa.flows.cli.arguments import Json, whole
from functa.flows.config.digests import digest
from functa.flows.config.schema import ConfigError

if TYPE_CHECKING:
    from functa.flows.sweep.plan import SweepPlan


AT_LEAST_ONE = validators.Number(gte=1)


def sweep(
    preset: Annotated[str, Parameter(help="A preset's name (see `functa presets`) or a YAML file.")],
    *,
    over: Annotated[
        list[str],
        Parameter(
            help="KEY=V,V,... of the config; repeatable: all combinations. KEY,KEY=[V,V],[V,V] changes keys together.",
            negative="",
            consume_multiple=False,
        ),
    ],
    metric: Annotated[
        list[str],
        Parameter(
            help="A figure of metrics.json, such as fd.classifier or psnr_by_bits.6; repeatable.",
            negative="",
            consume_multiple=False,
        ),
    ],
    draws: Annotated[
        int | None,
        Parameter(name="--random", converter=whole, validator=AT_LEAST_ONE, help="Only N of the combinations, drawn."),
    ] = None,
    seeds: Annotated[
        int, Parameter(converter=whole, validator=AT_LEAST_ONE, help="Each N times: seed, seed + 1, ...; mean and sd.")
    ] = 1,
    overrides: Annotated[
        list[str] | None,
        Parameter(name="--set", help="KEY=VALUE for all members; repeatable.", negative="", consume_multiple=False),
    ] = None,
    root: Annotated[
        str | None, Parameter(help="Where everything goes; default ./functa-runs/PRESET-by-KEY. A folder or s3://.")
    ] = None,
    from_root: Annotated[
        str | None, Parameter(name="--from", help="Take finished stages from this run's or sweep's root.")
    ] = None,
    deployment: Annotated[bool, Parameter(help="On the workers of a running server.", negative="")] = False,
) -> int:
    """Run a preset once for each value of one or several config keys, and gather a metric in a table and a plot.

    Members share what does not differ: field and functaset are made once, and so is a model that they only sample
    from otherwise. Run again, it goes on where it was; a member that failed is named, and the others go on.
    """
    from functa.flows.server.api import absolute
    from functa.flows.sweep.plan import plan_sweep
    from functa.flows.sweep.shared import check_lender

    plan = plan_sweep(preset, overrides or [], over, draws, seeds)
    check_lender(from_root)
    place = absolute(root or _default_root(plan))
    asked = {
        "preset": preset, "over": over, "metrics": metric, "overrides": overrides or [], "random": draws,
        "seeds": seeds, "from_root": absolute(from_root) if from_root else None,
        "command": shlex.join(["functa", *sys.argv[1:]]),
    }  # fmt: skip
    if not _standing(plan, place, metric, asked["command"]):
        _check_members(plan, place)
        _call_flow(place, asked, deployment)
    from functa.flows.cli.tables import print_sweep

    print_sweep(place)
    return 0


def _default_root(plan: "SweepPlan") -> str:
    keys = "-".join(key.rpartition(".")[2] for axis in plan.axes for key in axis.keys)
    return f"./functa-runs/{plan.preset}-by-{keys}"


def _standing(plan: "SweepPlan", root: str, metrics: list[str], command: str) -> bool:
    """Whether all members stand; then their figures are gathered anew, without a server."""
    from functa.flows.sweep.results import SweepTold, write_results

    told = SweepTold(plan, root, metrics, command)
    if not all(told.stands(member) for member in plan.members):
        return False
    for member in plan.members:
        told.note(member)
    told.refuse_unmeasured()
    write_results(told)
    return True


def _check_members(plan: "SweepPlan", root: str) -> None:
    """Raises ConfigError where a member does not fit itself, before the first one starts. Equals are checked once."""
    from functa.flows.config.preflight import preflight

    checked = set()
    for member in plan.members:
        config = member.config
        sections = [config.images, config.field, config.classifier and config.classifier.model]
        sections += [config.diffusion and config.diffusion.model]
        name = digest([None if each is None else each.model_dump(mode="json") for each in sections])
        if name in checked:
            continue
        checked.add(name)
        try:
            preflight(config, root, "pipeline")
        except ConfigError as error:
            raise ConfigError(f"{member.name}: {error}") from None


def _call_flow(root: str, asked: dict[str, Any], deployment: bool) -> None:
    from functa.flows.server.api import prepare_environment
    from functa.flows.server.embedded import embedded_server

    prepare_environment()
    from functa.flows.cli.progress import quiet_tracebacks

    quiet_tracebacks()
    if deployment:
        from functa.flows.server.deployed import on_server

        with on_server():
            from functa.flows.sweep.flow import sweep as run

            run(root, **asked, deployment=True)
        return
    with embedded_server():
        from functa.flows.sweep.flow import sweep as run

        run(root, **asked)


def compare(
    roots: Annotated[list[str], Parameter(help="Roots of runs, or folders runs/<id> of them.")],
    /,
    *,
    out: Annotated[Path | None, Parameter(help="Write an HTML report there: table, overlaid curves, config.")] = None,
    as_json: Json = False,
) -> int:
    """Figures of several runs side by side, their training curves overlaid, and the config keys that differ."""
    if len(roots) < 2:
        raise ConfigError("compare needs at least two roots, such as functa compare functa-runs/a functa-runs/b")
    from functa.tasks.report.compare.runs import compare_runs, read_runs

    comparison = compare_runs(read_runs(roots))
    if out is not None:
        from functa.tasks.report.compare.runs_page import write_comparison

        command = shlex.join(["functa", *sys.argv[1:]])
        write_comparison(comparison, out, command)
    if as_json:
        print(json.dumps(comparison.as_json(), indent=1))
        return 0
    from functa.flows.cli.tables import print_comparison

    print_comparison(comparison, out)
    return 0
