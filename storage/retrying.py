"""Reads that fail for a moment are tried again; those that fail for good end in the same error, a second later."""

import errno
import logging

from tenacity import RetryCallState, retry, retry_if_exception, stop_after_attempt, wait_exponential

__all__ = ["retrying"]

_ATTEMPTS = 5
_TRANSIENT = frozenset(
    {errno.EIO, errno.EAGAIN, errno.EINTR, errno.EBUSY, errno.ETIMEDOUT, errno.ESTALE, errno.EREMOTEIO,
     errno.ECONNRESET, errno.ENETRESET, errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTUNREACH}
)  # fmt: skip
_log = logging.getLogger(__name__)


def _transient(error: BaseException | None) -> bool:
    """Return whether an error, or what it comes from, may pass by itself."""
    if error is None:
        return False
    return (isinstance(error, OSError) and error.errno in _TRANSIENT) or _transient(error.__cause__)


def _tell(state: RetryCallState) -> None:
    error = state.outcome.exception() if state.outcome else None
    _log.warning("%s; trying again (%d of %d)", error, state.attempt_number + 1, _ATTEMPTS)


retrying = retry(
    retry=retry_if_exception(_transient),
    stop=stop_after_attempt(_ATTEMPTS),
    wait=wait_exponential(multiplier=0.05, max=0.5),
    before_sleep=_tell,
    reraise=True,
)
