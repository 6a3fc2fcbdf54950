"""Find the roots that hold what members of a sweep share, by digests of stages."""

from collections.abc import Sequence

from functa.flows.config.digests import inputs_of
from functa.flows.config.schema import PipelineConfig
from functa.flows.ledger import Ledger, MissingInput
from functa.flows.sweep.plan import Member, SweepPlan
from functa.storage.places.address import open_location
from functa.storage.places.location import Location
from functa.tasks.stage_table import STAGES


class SharedRoots:
    """The roots of shared stages: shared/STAGE-DIGEST below the sweep's root, one for each such stage."""

    def __init__(self, root: str, plan: SweepPlan, from_root: str | None) -> None:
        check_from_root(from_root)
        self.root = root
        self._shared = {(stage, name) for stage, name, _ in plan.shared()}
        self._from = from_root

    def root_of(self, stage: str, name: str) -> str:
        """Return the root of a shared stage."""
        return f"{self.root.rstrip('/')}/{shared_folder(stage, name)}"

    def reuse(self, member: Member, root: str, stages: Sequence[str]) -> None:
        """Write the records of stages that have finished elsewhere into a root.

        They come from shared/, or from the root that the sweep reuses; stages that neither has are left to be made.
        """
        for stage in stages:
            for other in self._others(stage, member.digests[stage]):
                if other != root and Ledger(member.config, root, other).up_to_date(stage) is not None:
                    break

    def begun(self, stage: str, name: str) -> str | None:
        """Return the root of a shared stage, None where it was not begun."""
        root = self.root_of(stage, name)
        return root if _begun(open_location(root)) else None

    def _others(self, stage: str, name: str) -> list[str]:
        found = [self.root_of(stage, name)] if (stage, name) in self._shared else []
        if self._from is not None:
            found += [f"{self._from.rstrip('/')}/{shared_folder(stage, name)}", self._from]
        return [uri for uri in found if _begun(open_location(uri))]


def check_from_root(from_root: str | None) -> None:
    """Raise MissingInput if the root to reuse stages from is neither a run's nor a sweep's."""
    if from_root is None:
        return
    root = open_location(from_root)
    if not root.list("stages/") and not root.list("shared/"):
        raise MissingInput(
            f"--from {from_root}: no run has been started there, and no sweep that shares a stage; "
            "name the root of one, or of a sweep's member"
        )


def with_inputs(config: PipelineConfig, stage: str) -> list[str]:
    """Return the stage's inputs, their inputs and, last, the stage itself."""
    before = [name for below in inputs_of(config, stage) for name in with_inputs(config, below)]
    return [*dict.fromkeys(before), stage]


def shared_folder(stage: str, name: str) -> str:
    """Return the folder of a shared stage below the sweep's root."""
    return f"shared/{STAGES[stage].command}-{name}"


def _begun(root: Location) -> bool:
    return bool(root.list("stages/"))
