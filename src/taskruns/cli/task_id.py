"""Task ids, as arguments."""

import sys
from typing import Any

import click
from click.shell_completion import CompletionItem

from taskruns.cli.discovery import Database
from taskruns.model import checked_name

_MOST = 50
"""Ids that a completion offers."""


class TaskId(click.ParamType[Any]):
    """The id of a task."""

    name = "task"

    def convert(self, value: object, parameter: click.Parameter | None, context: click.Context | None) -> Any:
        """Return the id."""
        try:
            return checked_name(str(value), "task id")
        except ValueError as error:
            self.fail(str(error), parameter, context)

    def shell_complete(
        self, context: click.Context, _parameter: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """Return the tasks with this beginning."""
        try:
            root = context.find_root()
            with Database.find(root.obj or root.params.get("db")).reading() as history:
                # The greatest id that comes before all those with this beginning, or near enough.
                before = incomplete and incomplete[:-1] + chr(ord(incomplete[-1]) - 1) + chr(sys.maxunicode)
                tasks = history.tasks(after=before or None, limit=_MOST)
        except Exception:  # noqa: BLE001  (a completion is a courtesy)
            return []
        return [CompletionItem(run.task_id) for run in tasks if run.task_id.startswith(incomplete)]
