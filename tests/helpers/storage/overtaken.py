"""A local location at which somebody else acts just before one of our own operations."""

from collections.abc import Callable
from dataclasses import dataclass, field

from functa.storage.places.local import LocalLocation
from functa.storage.places.location import Entry


@dataclass(frozen=True)
class Overtaken(LocalLocation):
    """Somebody else acts before our first object of a kind is put, or replaced."""

    act: Callable[[], object] = lambda: None
    at: str = ""
    done: list[bool] = field(default_factory=list)

    def create(self, key: str, data: bytes) -> bool:
        self._act_once(key)
        return super().create(key, data)

    def write(self, key: str, data: bytes) -> None:
        self._act_once(key)
        super().write(key, data)

    def leftovers(self) -> list[Entry]:
        if not self.at:
            self.act()
        return super().leftovers()

    def _act_once(self, key: str) -> None:
        if key.startswith(self.at) and not self.done:
            self.done.append(True)
            self.act()


@dataclass(frozen=True)
class Deleting(Overtaken):
    """Somebody else acts before our first deletion of a kind."""

    def create(self, key: str, data: bytes) -> bool:
        return LocalLocation.create(self, key, data)

    def write(self, key: str, data: bytes) -> None:
        LocalLocation.write(self, key, data)

    def delete(self, key: str) -> None:
        self._act_once(key)
        super().delete(key)
