"""What a command says when it cannot do what it was asked: one line on stderr, and the exit status."""

from __future__ import annotations

from typing import Final

WRONG: Final = 1  # the thing asked about failed
USAGE: Final = 2  # wrong arguments or settings
CANNOT_START: Final = 3  # the servers cannot be had, or their schema is too old


class Failure(Exception):
    """Ends a command. The message is a sentence for people."""

    def __init__(self, message: str, status: int = WRONG) -> None:
        super().__init__(message)
        self.status = status


def explained(error: Exception) -> Failure | None:
    """A Failure for what is foreseen; None for what deserves a traceback."""
    if isinstance(error, Failure):
        return error
    from agentflow.settings import SettingsError

    if isinstance(error, SettingsError):
        return Failure(str(error), USAGE)
    from agentflow.embedded import EmbeddedError

    if isinstance(error, EmbeddedError):
        return Failure(str(error), CANNOT_START)
    from agentflow.schema import SchemaError

    if isinstance(error, SchemaError):
        return Failure(str(error), CANNOT_START)
    from agentflow.database import Unavailable

    if isinstance(error, Unavailable):
        return Failure(
            f"the database cannot be reached ({one_line(error)}); `agentflow doctor` says more", CANNOT_START
        )
    from agentflow.backup.errors import Damaged, Refused

    if isinstance(error, Refused | Damaged):
        return Failure(str(error), USAGE if isinstance(error, Refused) else WRONG)
    from agentflow.storage import StorageError

    if isinstance(error, StorageError):
        return Failure(one_line(error), CANNOT_START)
    return None


def one_line(text: object) -> str:
    return " ".join(str(text).split())
