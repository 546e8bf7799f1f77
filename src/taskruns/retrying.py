"""Which errors are worth another try, and what may have happened before them."""

import sqlite3
import time
from collections.abc import Callable
from typing import Any, TypeVar

from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError

T = TypeVar("T")

_CONFLICT_SQLSTATES = {"40001", "40P01"}
_TRANSIENT_SQLSTATES = {*_CONFLICT_SQLSTATES, "53300", "55P03", "57P01", "57P02", "57P03"}
_CONFLICT_MYSQL_ERRORS = {1020, 1213}
_LOCK_WAIT = 1205
_TRANSIENT_MYSQL_ERRORS = {*_CONFLICT_MYSQL_ERRORS, _LOCK_WAIT, 1040, 1053, 1927, 2002, 2003, 2006, 2013}

OnRetry = Callable[[BaseException], None]
"""What is told of an error after which a call is tried again."""


def is_lost(error: BaseException) -> bool:
    """Whether the connection was lost, and with it perhaps the answer that all was written."""
    return isinstance(error, ConnectionError) or (isinstance(error, DBAPIError) and error.connection_invalidated)


def is_refusal(error: BaseException) -> bool:
    """Whether the database has written nothing, and may do so if it is asked again: busy, deadlock, not reached."""
    if is_lost(error) or not isinstance(error, DBAPIError) or isinstance(error, IntegrityError):
        return False
    cause: Any = error.orig
    if isinstance(cause, sqlite3.Error):
        return getattr(cause, "sqlite_errorcode", 0) & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
    if hasattr(cause, "sqlstate"):
        # None is what psycopg has for a connection that could not be made, whatever the reason.
        state = cause.sqlstate
        unreached = state is None and isinstance(error, OperationalError)
        return unreached or (state is not None and (state in _TRANSIENT_SQLSTATES or state.startswith("08")))
    return _mysql_number(cause) in _TRANSIENT_MYSQL_ERRORS


def is_held_up(error: BaseException) -> bool:
    """Whether it waited too long for what another writer has locked, or they met in a deadlock; not on SQLite."""
    cause: Any = getattr(error, "orig", None)
    return is_conflict(error) or getattr(cause, "sqlstate", None) == "55P03" or _mysql_number(cause) == _LOCK_WAIT


def is_conflict(error: BaseException) -> bool:
    """Whether writers that race have met in a deadlock or a serialization failure."""
    cause: Any = getattr(error, "orig", None)
    return getattr(cause, "sqlstate", None) in _CONFLICT_SQLSTATES or _mysql_number(cause) in _CONFLICT_MYSQL_ERRORS


def _mysql_number(cause: Any) -> object:
    return cause.args[0] if cause is not None and cause.args and not isinstance(cause, sqlite3.Error) else None


def cause_of(error: BaseException) -> str:
    """Return the first line of what a database said, without the statement and its values."""
    cause = getattr(error, "orig", None) or error
    text = str(cause.args[1] if isinstance(error, DBAPIError) and len(cause.args) > 1 else cause).strip()
    return text.splitlines()[0] if text else type(error).__name__


class Retry:
    """The tries of one call: whether there is to be another, and whether an answer was lost on the way."""

    def __init__(self, seconds: float, on_retry: OnRetry | None) -> None:
        self.lost = False
        self._on_retry = on_retry
        self._until = time.monotonic() + seconds

    def is_worth_it(self, error: BaseException) -> bool:
        """Whether to try again after ``error``: not when the tries, with the database's own waiting, took too long."""
        self.lost = self.lost or is_lost(error)
        if not (is_lost(error) or is_refusal(error)) or time.monotonic() >= self._until:
            return False
        if self._on_retry is not None:
            self._on_retry(error)
        return True

    def call(self, function: Callable[..., T], *arguments: Any) -> T:
        """Return what ``function`` returns, called until it does or there is to be no other try."""
        try:
            return function(*arguments)
        except Exception as error:
            if not self.is_worth_it(error):
                raise
        from tenacity import Retrying  # noqa: PLC0415  (only where something went wrong)

        result: T = Retrying(**self.policy())(function, *arguments)
        return result

    def policy(self) -> dict[str, Any]:
        """Return the arguments of tenacity's retrying, which waits longer from try to try, at random."""
        import tenacity  # noqa: PLC0415  (only where something went wrong)

        return {
            "retry": tenacity.retry_if_exception(self.is_worth_it),
            "wait": tenacity.wait_random_exponential(multiplier=0.02, max=5),
            "reraise": True,
        }
