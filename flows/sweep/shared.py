"""Which root holds what members of a sweep share. Found by digests: no list of keys says what a sweep may share."""

from collections.abc import Sequence

from functa.flows.config.digests import inputs_of
from functa.flows.config.schema import PipelineConfig
from functa.flows.ledger import Ledger, MissingInput
from functa.flows.sweep.plan import Member, SweepPlan
from functa.storage.places.address import open_location
from functa.storage.places.location import Location


class Lenders:
    """Below the sweep's root, shared/STAGE-DIGEST is the root of a stage that more than one member needs."""

    def __init__(self, root: str, plan: SweepPlan, from_root: str | None) -> None:
        check_lender(from_root)
        self.root = root
        self._shared = {(stage, name) for stage, name, _ in plan.shared()}
        self._from = from_root

    def shared_root(self, stage: str, name: str) -> str:
        """Root of a shared stage."""
        return f"{self.root.rstrip('/')}/{_folder(stage, name)}"

    def lend(self, member: Member, root: str, stages: Sequence[str]) -> None:
        """Writes the records of finished stages into a root.

        What the sweep shares comes from shared/, what another root has finished from there; what nobody has is left
        to be made.
        """
        for stage in stages:
            for lender in self._lenders(stage, member.digests[stage]):
                if lender != root and Ledger(member.config, root, lender).standing(stage) is not None:
                    break

    def _lenders(self, stage: str, name: str) -> list[str]:
        found = [self.shared_root(stage, name)] if (stage, name) in self._shared else []
        if self._from is not None:
            found += [f"{self._from.rstrip('/')}/{_folder(stage, name)}", self._from]
        return [uri for uri in found if _begun(open_location(uri))]


def check_lender(from_root: str | None) -> None:
    """Raises MissingInput for a root to take stages over from that is neither a run's nor a sweep's."""
    if from_root is None:
        return
    place = open_location(from_root)
    if not place.list("stages/") and not place.list("shared/"):
        raise MissingInput(
            f"--from {from_root}: no run has been started there, and no sweep that shares a stage; "
            "name the root of one, or of a sweep's member"
        )


def with_inputs(config: PipelineConfig, stage: str) -> list[str]:
    """The stage after all that it reads, and what that reads."""
    before = [name for below in inputs_of(config, stage) for name in with_inputs(config, below)]
    return [*dict.fromkeys(before), stage]


def _folder(stage: str, name: str) -> str:
    return f"shared/{stage.replace('_', '-')}-{name}"


def _begun(root: Location) -> bool:
    return bool(root.list("stages/"))
