"""What a job's function may raise, and what becomes of the job.

Anything else that it raises counts as `Transient`: retried with back-off until the attempts are spent.
"""

from __future__ import annotations

from typing import Final

#: The code of `OutOfMemory`, as it stands in rows.
OUT_OF_MEMORY: Final = "out_of_memory"


class JobError(Exception):
    """An error whose text may be shown to the caller: no secrets, no addresses of ours.

    `code` is a short stable word for programs (`no_video_stream`), the message a sentence for people.
    """

    def __init__(self, message: str, *, code: str | None = None) -> None:
        super().__init__(message)
        self.code = code


class Permanent(JobError):
    """Trying again cannot help (bad input, a 4xx of meaning): the job fails now."""


class Transient(JobError):
    """Trying again may help. `retry_after_s`, where the other side named one, is the least back-off."""

    def __init__(self, message: str, *, code: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message, code=code)
        self.retry_after_s = retry_after_s


class OutOfMemory(Transient):
    """The kernel killed a process of the job's, which had `peak_bytes` then."""

    def __init__(self, message: str, *, peak_bytes: int) -> None:
        super().__init__(message, code=OUT_OF_MEMORY)
        self.peak_bytes = peak_bytes


class Wait(JobError):
    """Not now (limit reached, GPU busy, Retry-After): parked for `seconds`, and the attempt is given back.

    `because`: an error that is to stand in the job's row meanwhile.
    """

    def __init__(
        self, seconds: float, reason: str, *, message: str | None = None, because: JobError | None = None
    ) -> None:
        super().__init__(message or f"waiting {seconds:g} s: {reason}", code=reason)
        self.seconds = seconds
        self.reason = reason
        self.because = because
