"""Other libraries that keep a record of what ran, each through its own interface and in a database of its own."""

import json
import logging
import subprocess
from itertools import count
from pathlib import Path
from typing import Any

from databases import Database
from shapes import Contender, Sample
from sqlalchemy import URL

LUIGI = Path(__file__).with_name("luigi_history.py")


class Peer(Contender):
    """A peer. On SQLite it is measured in a file as the library makes it, and in one that is in WAL mode already."""

    title: str
    database_name: str
    driver = "postgresql+psycopg"

    def __init__(self, database: Database, *, wal: bool) -> None:
        self.database = database
        self.wal = wal
        self.name = f"{self.title}, WAL" if wal else self.title

    def prepare(self) -> None:
        url = self.database.of_peer(self.database_name, wal=self.wal)
        self.url = url if self.database.kind == "sqlite" else url.set(drivername=self.driver)

    @property
    def url_text(self) -> str:
        return self.url.render_as_string(hide_password=False)

    url: URL


class Celery(Peer):
    """What a worker's process does for a task: the state STARTED (``task_track_started``), then SUCCESS.

    Each attempt is a task of its own here. As in a forked worker, which keeps its connections; another process makes a
    new one for each call, and is several times slower.
    """

    title = "Celery's backend"
    database_name = "celery"

    def start(self) -> None:
        from celery import Celery as App
        from celery.backends.database import DatabaseBackend

        self.numbers = count()
        self.backend: Any = DatabaseBackend(app=App("bench", set_as_current=False), url=self.url_text)
        self.backend.session_manager._after_fork()

    def open(self, task_id: str) -> int:
        number = next(self.numbers)
        self.backend.store_result(f"{task_id}-{number}", {"pid": 1, "hostname": "bench"}, "STARTED")
        return number

    def close(self, task_id: str, attempt: int) -> None:
        self.backend.store_result(f"{task_id}-{attempt}", None, "SUCCESS")

    def stop(self) -> None:
        for engine in self.backend.session_manager._engines.values():
            engine.dispose()


class Dbos(Peer):
    """A workflow that does nothing. DBOS records what it needs to run it again, which is more than a history."""

    title = "DBOS"
    database_name = "dbos"
    driver = "postgresql"
    pair_is_one_call = True

    def start(self) -> None:
        from dbos import DBOS

        logging.getLogger("dbos").setLevel(logging.ERROR)
        self.library: Any = DBOS
        DBOS.destroy(destroy_registry=True)
        DBOS(config={"name": "bench", "system_database_url": self.url_text, "log_level": "ERROR"})

        @DBOS.workflow()
        def work(_task_id: str) -> None:
            return None

        self.work = work
        DBOS.launch()

    def open(self, _task_id: str) -> int:
        return 0

    def close(self, task_id: str, _attempt: int) -> None:
        self.work(task_id)

    def stop(self) -> None:
        self.library.destroy(destroy_registry=True)


class Luigi(Peer):
    """Luigi's task history, in a process of its own: it works with SQLAlchemy 1.4 only."""

    title = "Luigi's history"
    database_name = "luigi"
    driver = "postgresql+psycopg2"

    def __init__(self, database: Database, python: str, *, wal: bool) -> None:
        super().__init__(database, wal=wal)
        self.python = python

    def sample(self, shape: str, seconds: float) -> Sample:
        """Have the process measure itself, while this one waits."""
        self.prepare()
        command = [self.python, str(LUIGI), self.url_text, shape, str(seconds)]
        result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        return Sample(**json.loads(result.stdout))
