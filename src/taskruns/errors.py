"""What can go wrong, as a tree.

TaskRunsError
├─ RunNotFoundError      no such run (also a LookupError)
├─ RunExistsError        the attempt was opened before
├─ RunClosedError        the run has ended otherwise
├─ AttemptConflictError  no free attempt number was found
└─ SchemaVersionError    the tables are missing, too old, or of another major version

Bad arguments are ValueError or TypeError; the database's own errors pass through as SQLAlchemy's.
"""

from taskruns.model import TaskRun


class TaskRunsError(Exception):
    """Base of all errors of this package."""


class RunNotFoundError(TaskRunsError, LookupError):
    """There is no such run."""

    def __init__(self, task_id: str, attempt: int) -> None:
        super().__init__(task_id, attempt)
        self.task_id = task_id
        self.attempt = attempt

    def __str__(self) -> str:
        return f"task {self.task_id!r} has no attempt {self.attempt}"


class RunExistsError(TaskRunsError):
    """The attempt was opened before, by another start."""

    def __init__(self, task_id: str, attempt: int) -> None:
        super().__init__(task_id, attempt)
        self.task_id = task_id
        self.attempt = attempt

    def __str__(self) -> str:
        return f"attempt {self.attempt} of task {self.task_id!r} exists already"


class RunClosedError(TaskRunsError):
    """The run has ended, with another outcome. ``run`` is what is stored."""

    def __init__(self, run: TaskRun) -> None:
        super().__init__(run)
        self.run = run

    def __str__(self) -> str:
        return f"attempt {self.run.attempt} of task {self.run.task_id!r} has ended already, as {self.run.phase}"


class AttemptConflictError(TaskRunsError):
    """Other writers took every number that was tried, or the task has used up its numbers."""

    def __init__(self, task_id: str) -> None:
        super().__init__(task_id)
        self.task_id = task_id

    def __str__(self) -> str:
        return f"no free attempt number was found for task {self.task_id!r}"


class SchemaVersionError(TaskRunsError):
    """The database's tables do not suit this version of taskruns."""

    def __init__(self, found: str | None, expected: str) -> None:
        super().__init__(found, expected)
        self.found = found
        self.expected = expected

    def __str__(self) -> str:
        if self.found is None:
            return f"the database has no taskruns tables (expected version {self.expected}): run `taskruns db upgrade`"
        if self.found.split("_")[0] == self.expected.split("_")[0]:
            return f"the database has version {self.found}, expected {self.expected}: run `taskruns db upgrade`"
        return (
            f"the database has version {self.found}, which this taskruns cannot use (expected {self.expected}): "
            "install a taskruns of the same major version, `pip install --upgrade taskruns`"
        )
