"""``taskruns replay``."""

import json

import click

from taskruns.cli import complain
from taskruns.cli.discovery import database, db_option
from taskruns.history import TaskRunHistory
from taskruns.kept import Mark
from taskruns.replay import Replayed
from taskruns.spool import files

_MEANINGS = {
    Mark.PRUNED: "ended a run that is gone",
    Mark.CONTRADICTED: "contradicted the end of a run, which stands",
    Mark.REJECTED: "could not be used",
}


@click.command("replay", short_help="Write what was kept while the database was out of use.")
@click.option("--json", "is_json", is_flag=True, help="Print a JSON object.")
@db_option
def replay_command(is_json: bool) -> None:
    """Write into the database what was kept while it could not be used.

    Files of processes that are still at it are left: they replay them themselves.
    """
    found = database()
    replayed = Replayed()
    if files(found.url):
        with found.options_checked(), TaskRunHistory.connect(found.url) as history:
            history.prepare()
            replayed = history.replay(wait=True)
    if is_json:
        facts = {mark.name.lower(): replayed.marks[mark] for mark in Mark}
        left = [str(path) for path in replayed.left]
        click.echo(json.dumps({"events": replayed.events, "files": replayed.files, **facts, "left": left}))
        return
    click.echo(f"{replayed.events} events of {replayed.files} files replayed")
    for mark, count in replayed.marks.items():
        complain(f"{count} {_MEANINGS[mark]}")
    for path in replayed.left:
        complain(f"{path} belongs to a living process and is left")
