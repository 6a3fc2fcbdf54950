"""What goes wrong in the world. str(error) is one line: the thing, the fault, the mend."""


class StorageError(Exception):
    """Something in the world: a missing folder, a full disk, a damaged object. Shown to people as it stands."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))  # one line, whatever a library put into its own message


class TransientError(StorageError):
    """A lost connection, a timeout, a server that was busy or failed: the same call may succeed later."""


class MissingObject(StorageError):
    """There is no object of that name."""


class DamagedObject(StorageError):
    """An object is not what its record says: short, altered, swapped or unreadable."""
