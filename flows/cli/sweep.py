"""`functa sweep`: one preset run with many settings, and a table of their figures."""

import json
import shlex
import sys
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter, validators
from pydantic import BaseModel

from functa.flows.cli.arguments import Deployment, FromRoot, Overrides, Preset, whole
from functa.flows.cli.tables import ABSENT, foldable
from functa.flows.config.digests import digest
from functa.flows.config.schema import ConfigError
from functa.flows.server.console import text_console
from functa.storage.places.address import open_location

if TYPE_CHECKING:
    from functa.flows.sweep.plan import SweepPlan


AT_LEAST_ONE = validators.Number(gte=1)


def sweep(
    preset: Preset,
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
        Parameter(
            name="--random",
            converter=whole,
            validator=AT_LEAST_ONE,
            help="Only N of the combinations, at random.",
        ),
    ] = None,
    seeds: Annotated[
        int, Parameter(converter=whole, validator=AT_LEAST_ONE, help="Each N times: seed, seed + 1, ...; mean and sd.")
    ] = 1,
    overrides: Overrides = None,
    root: Annotated[
        str | None, Parameter(help="Where everything goes; default ./functa-runs/PRESET-by-KEY. A folder or s3://.")
    ] = None,
    from_root: FromRoot = None,
    deployment: Deployment = False,
) -> int:
    """Run a preset once for each value of one or several config keys, and collect figures in a table and a plot.

    Members share stages that do not differ: field and functaset are made once. Run again, the sweep continues; where a
    member fails, the others go on.
    """
    from functa.flows.server.api import absolute
    from functa.flows.sweep.plan import plan_sweep
    from functa.flows.sweep.shared import check_from_root

    plan = plan_sweep(preset, overrides or [], over, draws, seeds)
    check_from_root(from_root)
    root = absolute(root or _default_root(plan))
    command = shlex.join(["functa", *sys.argv[1:]])
    asked = {
        "preset": preset, "over": over, "metrics": metric, "overrides": overrides or [], "random": draws,
        "seeds": seeds, "from_root": absolute(from_root) if from_root else None,
        "command": command,
    }  # fmt: skip
    if not _gather_if_finished(plan, root, metric, command):
        _check_members(plan, root)
        _call_flow(root, asked, deployment)
    print_sweep(root)
    return 0


def _default_root(plan: "SweepPlan") -> str:
    keys = "-".join(key.rpartition(".")[2] for axis in plan.axes for key in axis.keys)
    return f"./functa-runs/{plan.preset}-by-{keys}"


def _gather_if_finished(plan: "SweepPlan", root: str, metrics: list[str], command: str) -> bool:
    """Gather the figures again, without a server, if all members are up to date; return whether they are."""
    from functa.flows.sweep.results import SweepState, write_results

    state = SweepState(plan, root, metrics, command)
    if not all(state.is_finished(member) for member in plan.members):
        return False
    for member in plan.members:
        state.note(member)
    state.refuse_unmeasured()
    write_results(state)
    return True


def _check_members(plan: "SweepPlan", root: str) -> None:
    """Raise ConfigError, before the first member starts, for a member whose config contradicts itself."""
    from functa.flows.config.preflight import preflight

    checked = set()
    for member in plan.members:
        config = member.config
        sections: list[BaseModel | None] = [config.images, config.field]
        sections += [config.classifier and config.classifier.model, config.diffusion and config.diffusion.model]
        name = digest([None if each is None else each.model_dump(mode="json") for each in sections])
        if name in checked:
            continue
        checked.add(name)
        try:
            preflight(config, root, "pipeline")
        except ConfigError as error:
            raise ConfigError(f"{member.name}: {error}") from None


def _call_flow(root: str, asked: dict[str, Any], deployment: bool) -> None:
    if deployment:
        from functa.flows.server.deployed import on_server as session
    else:
        from functa.flows.server.session import prefect_session as session
    with session():
        from functa.flows.sweep.flow import sweep as run

        run(root, **asked, deployment=deployment)


def print_sweep(root: str) -> None:
    """Print mean and sd for every setting, the split that a choice would be made on, and the report's location."""
    location = open_location(root)
    results = json.loads(location.read("sweep.json"))
    console = text_console()
    table = foldable(*results["over"], *results["metrics"], title=f"{results['preset']}: sweep")
    for setting in results["settings"]:
        seeds = sum(member["values"] == setting["values"] for member in results["members"])
        figures = [_summary(setting["metrics"].get(metric), seeds) for metric in results["metrics"]]
        table.add_row(*setting["values"].values(), *figures)
    console.print(table)
    for line in results["splits"].values():
        console.print(line, soft_wrap=True)
    console.print(f"Report:  {location.uri}/report.html", soft_wrap=True)
    console.print(f"Table:   {location.uri}/sweep.csv", soft_wrap=True)


def _summary(found: dict[str, Any] | None, seeds: int) -> str:
    """Return mean and sd, and the number of seeds where some have no figure."""
    if found is None:
        return ABSENT
    count = len(found["values"])
    spread = "" if found["sd"] is None else f" \u00b1 {found['sd']:.2g}"
    return f"{found['mean']:.4g}{spread}" + (f" ({count} of {seeds})" if count < seeds else "")
