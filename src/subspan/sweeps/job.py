"""A run of a sweep, and how it ended: the values that processes of a sweep send each other."""

from __future__ import annotations

import errno
import traceback
from dataclasses import dataclass
from typing import Literal

from subspan.errors import Stopped, SubspanError
from subspan.training.config import Run
from subspan.training.locks import BusyError
from subspan.training.records import CompleteRun

FULL = (errno.ENOSPC, errno.EDQUOT)  # no room, or none for this user


@dataclass(frozen=True)
class Job:
    """One run of a sweep and the name of its folder."""

    name: str
    run: Run


@dataclass(frozen=True)
class Outcome:
    """The end of a run.

    It is "done" with a record; "failed" with an error; "busy" if another process trains it;
    "stopped" if it saved where it stands; "full" if the disk is; "died" if its process was killed.
    Only the first two are final.
    """

    job: Job
    status: Literal["done", "failed", "busy", "stopped", "full", "died"]
    record: CompleteRun | None = None
    error: str = ""  # one sentence on what went wrong, with the exception's type unless it is ours
    traceback: str = ""  # where it went wrong, unless the input is to blame
    errno: int = 0  # of a full disk

    @classmethod
    def of_error(cls, job: Job, error: Exception | Stopped) -> Outcome:
        """Return the outcome of a run that raised an exception."""
        if isinstance(error, Stopped):
            return cls(job, "stopped")
        if isinstance(error, BusyError):
            return cls(job, "busy")
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, OSError) and cause.errno in FULL:
                return cls(job, "full", errno=cause.errno)
            cause = cause.__cause__ or cause.__context__
        if isinstance(error, SubspanError):
            return cls(job, "failed", error=str(error))
        where = "".join(traceback.format_exception(error))
        return cls(job, "failed", error=f"{type(error).__name__}: {error}", traceback=where)
