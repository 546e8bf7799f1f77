"""Many runs opened and closed by one transaction of few statements: what group commit writes.

A statement gets all its runs as one JSON text, which every database takes apart quicker than as many parameters.
"""

import json
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection, TextClause, text
from sqlalchemy.exc import SQLAlchemyError

from taskruns.model import Outcome, TaskRun
from taskruns.prepared import prepared
from taskruns.writing import Start

Key = tuple[str, int]


@dataclass(slots=True)
class Batch:
    """Starts, and runs with the outcomes by which they end; no task occurs twice."""

    starts: list[Start] = field(default_factory=list)
    ends: list[tuple[TaskRun, Outcome]] = field(default_factory=list)

    def write(self, connection: Connection) -> tuple[dict[str, int], set[Key]]:
        """Write all in one transaction; return the numbers of the tasks' runs that were opened, and what was closed.

        What is missing there was not written: its number is taken, the run has ended, or does not exist. On MariaDB
        none of the ends is told where one is missing; closing such a run once more is harmless.

        Raises:
            SQLAlchemyError: nothing was written, if the connection was not lost.
        """
        backend = connection.dialect.name
        starts, ends = self._starts(backend), self._ends(backend)
        if not self.starts:
            return {}, self._close(connection, ends)
        if not self.ends:
            return _open(connection, starts), set()
        if backend == "postgresql":
            rows = prepared(connection.dialect, _both).fetch(connection, {"starts": starts, "ends": ends})
            opened = {task_id: attempt for is_start, task_id, attempt in rows if is_start}
            return opened, {(task_id, attempt) for is_start, task_id, attempt in rows if not is_start}
        try:
            _tell(connection, _begin)
            closed, opened = self._close(connection, ends), _open(connection, starts)
            _tell(connection, _commit)
        except SQLAlchemyError:
            if not connection.invalidated:
                _tell(connection, _roll_back)
            raise
        except BaseException as error:  # an interrupt between two statements: the transaction must not stay open
            connection.invalidate(error)
            raise
        return opened, closed

    def _close(self, connection: Connection, ends: str) -> set[Key]:
        dialect = connection.dialect
        if not dialect.update_returning:
            found = prepared(dialect, _close_counted).write(connection, {"ends": ends})
            return {(run.task_id, run.attempt) for run, _ in self.ends} if found == len(self.ends) else set()
        build = _close_postgresql if dialect.name == "postgresql" else _close_sqlite
        return {(row[0], row[1]) for row in prepared(dialect, build).fetch(connection, {"ends": ends})}

    def _starts(self, backend: str) -> str:
        cut = _CUT[backend]
        rows = []
        for start in self.starts:
            run = start.run
            row: dict[str, Any] = {
                "task_id": run.task_id,
                "started_at": run.started_at.isoformat(" ", "microseconds")[:cut],
                "supervisor_id": run.supervisor_id,
                "source": run.source,
            }
            if start.numbered:
                row["attempt"] = run.attempt
            if run.submission is not None:
                row["submission"] = run.submission
            if run.source_attempt is not None:
                row["source_attempt"] = run.source_attempt
            rows.append(row)
        return json.dumps(rows, ensure_ascii=False)

    def _ends(self, backend: str) -> str:
        cut = _CUT[backend]
        return json.dumps(
            [
                {
                    "task_id": run.task_id,
                    "attempt": run.attempt,
                    "phase": outcome.phase,
                    "finished_at": outcome.finished_at.isoformat(" ", "microseconds")[:cut],
                    "error": outcome.error,
                    "exit_code": outcome.exit_code,
                }
                for run, outcome in self.ends
            ],
            ensure_ascii=False,
        )


_CUT = {"postgresql": None, "sqlite": -6, "mysql": -6, "mariadb": -6}
"""Where a time in UTC ends as the database stores it: with its offset, or before that."""


def _open(connection: Connection, starts: str) -> dict[str, int]:
    build = {"sqlite": _open_sqlite, "postgresql": _open_postgresql}.get(connection.dialect.name, _open_mariadb)
    return {row[0]: row[1] for row in prepared(connection.dialect, build).fetch(connection, {"starts": starts})}


def _tell(connection: Connection, build: Any) -> None:
    prepared(connection.dialect, build, connection.dialect.name).write(connection, {})


def _begin(backend: str) -> TextClause:
    # IMMEDIATE waits for other writers, as in engine.transaction.
    return text("BEGIN IMMEDIATE" if backend == "sqlite" else "BEGIN")


def _commit(_backend: str) -> TextClause:
    return text("COMMIT")


def _roll_back(_backend: str) -> TextClause:
    return text("ROLLBACK")


def _open_sqlite() -> TextClause:
    return text("""
        INSERT INTO task_runs
            (task_id, attempt, phase, started_at, source, submission, source_attempt, supervisor_id)
        SELECT task_id,
               coalesce(attempt, (SELECT coalesce(max(last.attempt), 0) + 1 FROM task_runs AS last
                                  WHERE last.task_id = told.task_id)),
               'running', started_at, source, submission, source_attempt, supervisor_id
        FROM (SELECT json_extract(value, '$.task_id') AS task_id,
                     json_extract(value, '$.attempt') AS attempt,
                     json_extract(value, '$.started_at') AS started_at,
                     json_extract(value, '$.source') AS source,
                     json_extract(value, '$.submission') AS submission,
                     json_extract(value, '$.source_attempt') AS source_attempt,
                     json_extract(value, '$.supervisor_id') AS supervisor_id
              FROM json_each(:starts)) AS told
        WHERE true
        ON CONFLICT DO NOTHING
        RETURNING task_id, attempt
    """)


def _close_sqlite() -> TextClause:
    return text("""
        UPDATE task_runs
        SET phase = json_extract(told.value, '$.phase'),
            finished_at = max(started_at, json_extract(told.value, '$.finished_at')),
            error = json_extract(told.value, '$.error'),
            exit_code = json_extract(told.value, '$.exit_code'),
            recovered = false
        FROM json_each(:ends) AS told
        WHERE task_id = json_extract(told.value, '$.task_id')
          AND attempt = json_extract(told.value, '$.attempt')
          AND (finished_at IS NULL OR recovered)
        RETURNING task_id, attempt
    """)


_OPENING = """
    INSERT INTO task_runs (task_id, attempt, phase, started_at, source, submission, source_attempt, supervisor_id)
    SELECT told.task_id,
           coalesce(told.attempt, (SELECT coalesce(max(last.attempt), 0) + 1 FROM task_runs AS last
                                   WHERE last.task_id = told.task_id)),
           'running', told.started_at, told.source, told.submission, told.source_attempt, told.supervisor_id
    FROM json_to_recordset(:starts) AS told
        (task_id text, attempt bigint, started_at timestamptz, source text, submission text, source_attempt bigint,
         supervisor_id bigint)
    ON CONFLICT DO NOTHING
    RETURNING task_id, attempt
"""

# What is true of every attempt has PostgreSQL expect one run and not 100, and so look them up by their keys: else it
# reads all of a table that is not yet large, and goes on with that kept plan when the table has grown.
_CLOSING = """
    UPDATE task_runs AS run
    SET phase = told.phase, finished_at = greatest(run.started_at, told.finished_at), error = told.error,
        exit_code = told.exit_code, recovered = false
    FROM json_to_recordset(:ends) AS told
        (task_id text, attempt bigint, phase text, finished_at timestamptz, error text, exit_code integer)
    WHERE run.task_id = told.task_id AND run.attempt = told.attempt AND told.attempt = abs(told.attempt)
      AND (run.finished_at IS NULL OR run.recovered)
    RETURNING run.task_id, run.attempt
"""


def _open_postgresql() -> TextClause:
    return text(_OPENING)


def _close_postgresql() -> TextClause:
    return text(_CLOSING)


def _both() -> TextClause:
    # One round trip, and no BEGIN and COMMIT; but slower than either of them where there is no need for the other.
    told = "SELECT true, task_id, attempt FROM opened UNION ALL SELECT false, task_id, attempt FROM closed"
    return text(f"WITH closed AS ({_CLOSING}), opened AS ({_OPENING}) {told}")


# JSON_TABLE cuts texts and numbers to the width of their column without a word: those are wider than what can come.
def _open_mariadb() -> TextClause:
    # ORDER BY with LIMIT reads one entry of the key, max() all runs of the task.
    return text("""
        INSERT INTO task_runs
            (task_id, attempt, phase, started_at, source, submission, source_attempt, supervisor_id)
        SELECT told.task_id,
               coalesce(told.attempt, coalesce((SELECT last.attempt FROM task_runs AS last
                                                WHERE last.task_id = told.task_id
                                                ORDER BY last.attempt DESC LIMIT 1), 0) + 1),
               'running', told.started_at, told.source, told.submission, told.source_attempt, told.supervisor_id
        FROM JSON_TABLE(:starts, '$[*]' COLUMNS (
            task_id VARCHAR(256) CHARACTER SET utf8mb4 COLLATE utf8mb4_bin PATH '$.task_id' ERROR ON ERROR,
            attempt BIGINT PATH '$.attempt' ERROR ON ERROR,
            started_at DATETIME(6) PATH '$.started_at' ERROR ON ERROR,
            source VARCHAR(256) CHARACTER SET utf8mb4 COLLATE utf8mb4_bin PATH '$.source' ERROR ON ERROR,
            submission VARCHAR(256) CHARACTER SET utf8mb4 COLLATE utf8mb4_bin PATH '$.submission' ERROR ON ERROR,
            source_attempt BIGINT PATH '$.source_attempt' ERROR ON ERROR,
            supervisor_id BIGINT PATH '$.supervisor_id' ERROR ON ERROR
        )) AS told
        RETURNING task_id, attempt
    """)


def _close_counted() -> TextClause:
    return text("""
        UPDATE JSON_TABLE(:ends, '$[*]' COLUMNS (
            task_id VARCHAR(256) CHARACTER SET utf8mb4 COLLATE utf8mb4_bin PATH '$.task_id' ERROR ON ERROR,
            attempt BIGINT PATH '$.attempt' ERROR ON ERROR,
            phase VARCHAR(17) CHARACTER SET utf8mb4 COLLATE utf8mb4_bin PATH '$.phase' ERROR ON ERROR,
            finished_at DATETIME(6) PATH '$.finished_at' ERROR ON ERROR,
            error MEDIUMTEXT CHARACTER SET utf8mb4 COLLATE utf8mb4_bin PATH '$.error' ERROR ON ERROR,
            exit_code BIGINT PATH '$.exit_code' ERROR ON ERROR
        )) AS told
        STRAIGHT_JOIN task_runs AS run ON run.task_id = told.task_id AND run.attempt = told.attempt
        SET run.phase = told.phase, run.finished_at = greatest(run.started_at, told.finished_at),
            run.error = told.error, run.exit_code = told.exit_code, run.recovered = false
        WHERE run.finished_at IS NULL OR run.recovered
    """)
