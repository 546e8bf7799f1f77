"""``taskruns supervisors`` and ``taskruns recover``."""

import json
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import click
from rich.text import Text

from taskruns.cli import complain
from taskruns.cli.discovery import database, db_option
from taskruns.cli.durations import Duration
from taskruns.cli.options import json_option
from taskruns.cli.output import columns_of, print_json, print_rows, print_table, printable
from taskruns.filters import RunFilter
from taskruns.liveness import STALE_AFTER, Process, Supervisor
from taskruns.times import rfc3339
from taskruns.wording import readable

_STYLES = {"alive": "green", "idle": "", "stale": "red"}
_HEADINGS = ("SUPERVISOR", "SOURCE", "STATE", "ACTIVE", "LAST SEEN", "SINCE (UTC)")


_stale_after = click.option(
    "--stale-after",
    type=Duration(),
    default=f"{STALE_AFTER:.0f}s",
    show_default=True,
    help="How long a supervisor that cannot be seen from here may be silent.",
)


@click.command("supervisors", short_help="List the processes that watch over runs.")
@_stale_after
@json_option
@db_option
def supervisors_command(stale_after: float, as_json: bool) -> None:
    """List the processes that watch over runs: alive, idle (without an active run), or stale.

    The runs of a stale one are closed by `taskruns recover`.
    """
    here = Process.here()
    with database().reading() as history:
        found = [(known, _state(known, here, stale_after)) for known in history.supervisors()]
    if as_json:
        for known, state in found:
            click.echo(json.dumps(_wire(known, state)))
    else:
        print_rows(_HEADINGS, [_row(known, state) for known, state in found])


def _state(known: Supervisor, here: Process, stale_after: float) -> str:
    if known.is_dead(here, stale_after if known.active_runs else None):
        return "stale"
    return "alive" if known.active_runs else "idle"


def _wire(known: Supervisor, state: str) -> dict[str, Any]:
    return {
        "id": known.id,
        "source": known.source,
        "host": known.process.host,
        "pid": known.process.pid,
        "state": state,
        "activeRuns": known.active_runs,
        "startedAt": rfc3339(known.started_at),
        "heartbeatAt": rfc3339(known.heartbeat_at),
        "silenceMs": known.silence // timedelta(milliseconds=1),
        **({"stream": True} if known.stream else {}),
    }


def _row(known: Supervisor, state: str) -> Sequence[Text]:
    return (
        Text(printable(str(known.process))),
        Text(printable(known.source)),
        Text(state, style=_STYLES[state]),
        Text(str(known.active_runs)),
        Text(f"{readable(known.silence)} ago"),
        Text(f"{known.started_at:%F %T}"),
    )


@click.command("recover", short_help="Close the active runs of processes that are gone.")
@_stale_after
@click.option(
    "--unsupervised",
    type=Duration(),
    help="Also close runs without a supervisor that started so long ago: written by SQL, or imported.",
)
@click.option("--dry-run", is_flag=True, help="Only show what would be closed.")
@json_option
@db_option
def recover_command(stale_after: float, unsupervised: float | None, dry_run: bool, as_json: bool) -> None:
    """Close the active runs of processes that are gone, as failed; show these runs.

    On this host a process that has ended is gone; elsewhere one that has given no sign of life for a while. A real
    outcome that comes later replaces the inferred one.
    """
    found = database()
    with found.reading() if dry_run else found.looking_after() as history:
        runs = history.recover(stale_after=stale_after, unsupervised_after=unsupervised, dry_run=dry_run)
    if as_json:
        for run in runs:
            print_json(run.to_wire())
        return
    print_table(runs, columns_of(RunFilter()))
    many = f"{len(runs)} run{'s' * (len(runs) != 1)}"
    complain(f"{many} would be closed" if dry_run else f"{many} closed")
