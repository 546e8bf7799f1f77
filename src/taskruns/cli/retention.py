"""``taskruns prune`` and ``taskruns forget``."""

import json

import click

from taskruns.cli import complain
from taskruns.cli.discovery import configured_retention, database, db_option
from taskruns.cli.numbers import Whole
from taskruns.cli.options import json_object_option
from taskruns.cli.output import printable
from taskruns.cli.progress import progress
from taskruns.cli.task_id import TaskId
from taskruns.model import MAX_ATTEMPT
from taskruns.retention import EMBEDDED, Retention


@click.command("prune", short_help="Delete old runs.")
@click.option(
    "--succeeded", metavar="DURATION", help="How long to keep succeeded runs, such as 90d, or never to delete any."
)
@click.option("--others", metavar="DURATION", help="How long to keep runs that ended otherwise.")
@click.option("--keep", metavar="N", help="How many of the newest runs of each task to keep whatever their age.")
@click.option("--forget-idle", metavar="DURATION", help="After which time without a run to delete all of a task.")
@click.option(
    "--task", metavar="TASK|GLOB", help="Only this task, or those that match, such as 'import:*'; [*] is a star."
)
@click.option("--dry-run", is_flag=True, help="Delete nothing, only tell how many runs would be.")
@json_object_option
@click.option("--compact", is_flag=True, help="Give the space back afterwards; writers wait meanwhile.")
@db_option
def prune_command(
    succeeded: str | None,
    others: str | None,
    keep: str | None,
    forget_idle: str | None,
    task: str | None,
    dry_run: bool,
    as_json: bool,
    compact: bool,
) -> None:
    """Delete old runs.

    What is not given is as configured (TASKRUNS_RETENTION, or `retention` in a configuration file), else 90d for
    succeeded runs, 365d for the others, and 10; of the default database 400d for idle tasks. Active runs, the latest
    run of a task and its latest succeeded one always stay.
    """
    given = {"succeeded": succeeded, "others": others, "keep": keep, "forget-idle": forget_idle}
    found = database()
    default = EMBEDDED if found.is_default else Retention()
    try:
        retention = (configured_retention(default) or default).changed(
            {name: text for name, text in given.items() if text is not None}
        )
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    if dry_run and compact:
        raise click.UsageError("--compact changes the file, which --dry-run does not")
    with found.reading() if dry_run else found.looking_after() as history:
        with progress() as bar:
            done = 0

            def advance(count: int) -> None:
                nonlocal done
                bar.advance(count - done)
                done = count

            count = history.prune(retention, task=task, dry_run=dry_run, on_progress=advance)
        if as_json:
            click.echo(json.dumps({"runs": count}))
        else:
            click.echo(f"{_counted(count)} {'would be ' if dry_run else ''}deleted")
        if compact and not dry_run:
            history.compact()


@click.command("forget", short_help="Delete the runs of a task, or the texts of their errors.")
@click.argument("task", type=TaskId())
@click.argument("attempt", type=Whole(1, MAX_ATTEMPT), required=False)
@click.option("--error-only", is_flag=True, help="Keep the runs and remove the text of their errors.")
@db_option
def forget_command(task: str, attempt: int | None, error_only: bool) -> int:
    """Delete the runs of TASK that have ended, or only ATTEMPT.

    For a secret in the text of an error, or a task id with a typo. Of an SQLite database nothing of it stays in the
    file; servers keep it in their logs and backups.
    """
    with database().looking_after() as history:
        is_known = history.last_run(task) is not None
        if not is_known or (attempt is not None and history.get_run(task, attempt) is None):
            complain(f"no run of {printable(task if attempt is None or not is_known else f'{task} {attempt}')}")
            return 1
        count = history.forget(task, attempt, error_only=error_only)
        click.echo(f"{_counted(count, 'error' if error_only else 'run')} {'removed' if error_only else 'deleted'}")
        left = [] if error_only else history.active_runs(task)
    if attempt is not None:
        left = [run for run in left if run.attempt == attempt]
    if left:
        complain(f"not deleted, since active: {_counted(len(left))} of {printable(task)}")
    return 1 if left else 0


def _counted(number: int, what: str = "run") -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
