"""Measures Luigi's task history for bench_recording.py, and prints a sample as JSON.

python luigi_history.py URL SHAPE SECONDS: the python is that of an environment with requirements-luigi.txt.
"""

import dataclasses
import json
import sys
from itertools import count

from luigi import configuration
from luigi.db_task_history import DbTaskHistory
from luigi.scheduler import Task
from shapes import SHAPES, Contender


class LuigiHistory(Contender):
    """What the scheduler calls when a task starts and when it ends.

    Luigi keeps one record for a task and its parameters, so that each attempt has a parameter of its own.
    """

    name = "Luigi's history"

    def __init__(self, url: str) -> None:
        configuration.get_config().set("task_history", "db_connection", url.replace("%", "%%"))

    def start(self) -> None:
        self.history = DbTaskHistory()
        self.numbers = count()
        self.running: dict[int, Task] = {}

    def open(self, task_id: str) -> int:
        number = next(self.numbers)
        task = Task(f"{task_id}__{number}", "PENDING", [], family=task_id, params={"attempt": str(number)})
        self.running[number] = task
        self.history.task_started(task, "bench")
        return number

    def close(self, _task_id: str, attempt: int) -> None:
        self.history.task_finished(self.running.pop(attempt), successful=True)

    def stop(self) -> None:
        self.history.engine.dispose()


if __name__ == "__main__":
    url, shape, seconds = sys.argv[1:]
    print(json.dumps(dataclasses.asdict(SHAPES[shape](LuigiHistory(url), float(seconds)))))
