"""A location whose user dies before a certain change: what a SIGKILL leaves, in one process."""

from dataclasses import dataclass, field

from functa.storage.places.local import LocalLocation
from functa.storage.places.location import Entry, Location


class Killed(BaseException):
    """Acts as a SIGKILL: no code under test may catch it."""


@dataclass(frozen=True)
class Mortal(Location):
    """A folder whose user dies before the k-th change.

    No LocalLocation, of which objects are written side by side: which of them exist would be a matter of luck.
    """

    left: list[int] = field(default_factory=list)

    @property
    def _folder(self) -> LocalLocation:
        return LocalLocation(self.uri)

    def _count(self) -> None:
        self.left[0] -= 1
        if self.left[0] < 0:
            raise Killed

    def create(self, key: str, data: bytes) -> bool:
        self._count()
        return self._folder.create(key, data)

    def write(self, key: str, data: bytes) -> None:
        self._count()
        self._folder.write(key, data)

    def delete(self, key: str) -> None:
        self._count()
        self._folder.delete(key)

    def read(self, key: str, limit: int | None = None) -> bytes:
        return self._folder.read(key, limit)

    def entry(self, key: str) -> Entry | None:
        return self._folder.entry(key)

    def entries(self, prefix: str = "") -> list[Entry]:
        return self._folder.entries(prefix)

    def leftovers(self) -> list[Entry]:
        return self._folder.leftovers()

    def free_bytes(self) -> int | None:
        return self._folder.free_bytes()
