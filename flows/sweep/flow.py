"""The sweep: what members share is made once, each member is a run of the pipeline, all are gathered in one table."""

import threading
import time
from collections.abc import Callable, Sequence
from contextvars import copy_context
from queue import Empty, SimpleQueue
from typing import Any

from prefect import flow, get_run_logger
from prefect.artifacts import create_table_artifact

from functa.flows.config.digests import stages_of
from functa.flows.config.load import with_absolute_images
from functa.flows.ledger import Ledger
from functa.flows.pipeline import pipeline
from functa.flows.server.pool.stage_runs import run_stage
from functa.flows.stage_flow import load_stage, queue_of
from functa.flows.sweep.plan import Member, SweepPlan, plan_sweep
from functa.flows.sweep.results import SweepState, write_results
from functa.flows.sweep.shared import SharedRoots, with_inputs
from functa.storage.errors import one_line
from functa.tasks.dispatch.progress import warn_if_unreachable
from functa.tasks.report.artifacts import cells
from functa.tasks.report.compare.sweep_page import table
from functa.tasks.stage_table import STAGES

AT_ONCE = 8  # runs on a server's workers that this one follows at a time; on its own cores one after the other

Work = Callable[[], None]


@flow(name="sweep", flow_run_name="sweep {preset}", persist_result=False)
def sweep(
    root: str,
    *,
    preset: str,
    over: list[str],
    metrics: list[str],
    overrides: list[str] | None = None,
    random: int | None = None,
    seeds: int = 1,
    from_root: str | None = None,
    deployment: bool = False,
    command: str = "",
) -> dict[str, Any]:
    """Run every member that is not up to date; return what sweep.json holds.

    Args:
        root: Folder or s3://bucket/prefix of members/, shared/, sweep.json, sweep.csv and report.html.
        preset: A preset's name or a YAML file.
        over: KEY=VALUE,VALUE each; all combinations are run.
        metrics: Dotted names of figures of metrics.json.
        overrides: KEY=VALUE each, for all members.
        random: Draw this many of the combinations.
        seeds: Repeat each with this many seeds.
        from_root: Finished stages are reused from this root, a run's or a sweep's, where their digests agree.
        deployment: Members and shared stages are runs of their deployments, on workers of the server.
        command: The command line, for the report.
    """
    plan = plan_sweep(preset, overrides or [], over, random, seeds)
    shared = SharedRoots(root, plan, from_root)
    state = SweepState(plan, root, metrics, command)
    _share(plan, shared, state, deployment)
    _run_members(plan, shared, state, deployment)
    results = write_results(state)
    with warn_if_unreachable("the sweep's table"):
        columns, rows = table(state.sweep())
        create_table_artifact(
            cells([dict(zip(columns, row)) for row in rows]), key="sweep", description="Mean and sd by setting"
        )
    state.raise_failed()
    state.refuse_unmeasured()
    return results


def _share(plan: SweepPlan, shared: SharedRoots, state: SweepState, deployment: bool) -> None:
    """Make the stages that several unfinished members share; if one fails, so do these members."""
    for stage in dict.fromkeys(stage for stage, _, _ in plan.shared()):
        todo = [(name, member) for at, name, member in plan.shared() if at == stage]
        for some in _by_bits(todo, plan) if stage == "encode" else [todo]:
            work = [_shared_work(stage, name, member, plan, shared, state, deployment) for name, member in some]
            _each([each for each in work if each is not None], deployment)


def _by_bits(todo: Sequence[tuple[Any, Member]], plan: SweepPlan) -> list[list[tuple[Any, Member]]]:
    """Return those first whose latents are encoded, then those whose latents are made from others of 32 bits."""
    return [[each for each in todo if (plan.float_member(each[1]) is not None) is later] for later in (False, True)]


def _shared_work(
    stage: str, name: str, member: Member, plan: SweepPlan, shared: SharedRoots, state: SweepState, deployment: bool
) -> Work | None:
    sharing = [each for each in plan.members if each.digests.get(stage) == name]
    if all(state.is_finished(each) or each in state.failed for each in sharing):
        return None

    def work() -> None:
        root = shared.root_of(stage, name)
        named = STAGES[stage].command
        try:
            shared.reuse(member, root, with_inputs(member.config, stage))
            if Ledger(member.config, root).up_to_date(stage) is not None:
                return
            get_run_logger().info(f"{named} for {len(sharing)} of {len(plan.members)} members, in {root}")
            source = plan.float_member(member) if stage == "encode" else None
            latents = None if source is None else shared.begun(stage, source.digests[stage])
            _run(stage, member, root, latents, deployment)
        except Exception as error:
            get_run_logger().error(f"{named} for {len(sharing)} members: failed: {_line(error)}")
            for each in (each for each in sharing if not state.is_finished(each)):
                state.fail(each, f"{named}, which it shares: {_line(error)}")

    return work


def _run_members(plan: SweepPlan, shared: SharedRoots, state: SweepState, deployment: bool) -> None:
    def work(number: int, member: Member) -> Work:
        def run() -> None:
            begun = time.monotonic()
            which = f"member {number} of {len(plan.members)}, {member.name}"
            if not state.is_finished(member):
                try:
                    made = [stage for stage in stages_of(member.config) if stage != "evaluate"]
                    shared.reuse(member, state.root_of(member), made)
                    source = plan.float_member(member)
                    whole = source is not None and state.is_finished(source)
                    other = state.root_of(source) if source is not None and whole else state.first_finished()
                    _run("pipeline", member, state.root_of(member), other, deployment)
                except Exception as error:
                    state.fail(member, _line(error))
                    get_run_logger().error(f"{which}: failed: {_line(error)}")
                    return
            state.finish(member)
            get_run_logger().info(f"{which}: {state.figures(member)}, after {time.monotonic() - begun:.0f} s")

        return run

    todo = [(number, member) for number, member in enumerate(plan.members, 1) if member not in state.failed]
    for some in _by_bits(todo, plan):
        _each([work(number, member) for number, member in some], deployment)


def _run(name: str, member: Member, root: str, from_root: str | None, deployment: bool) -> None:
    config = with_absolute_images(member.config)
    parameters: dict[str, Any] = {"root": root, "from_root": from_root, "config": config}
    if deployment:
        queue = queue_of(STAGES[name], config) if name in STAGES else None
        run_stage(name.replace("_", "-"), parameters | {"config": config.model_dump(mode="json")}, queue)
    elif name == "pipeline":
        pipeline(**parameters)
    else:
        load_stage(name)(**parameters)


def _each(todo: Sequence[Work], deployment: bool) -> None:
    """Run one after the other here; on workers several at a time, in threads that end with an interrupted command."""
    if not deployment:
        for work in todo:
            work()
        return
    queue: SimpleQueue[Work] = SimpleQueue()
    faults: list[BaseException] = []
    for work in todo:
        queue.put(work)

    def follow() -> None:
        while not faults:
            try:
                queue.get_nowait()()
            except Empty:
                return
            except BaseException as error:
                faults.append(error)

    threads = [
        threading.Thread(target=copy_context().run, args=(follow,), daemon=True) for _ in range(min(AT_ONCE, len(todo)))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        while thread.is_alive():
            thread.join(1)
    if faults:
        raise faults[0]


def _line(error: Exception) -> str:
    return one_line(error)[:500]
