"""A disk that takes longer, for bench_recording.py: ``slowsync.c`` in its process and in a PostgreSQL of its own."""

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

SOURCE = Path(__file__).with_name("slowsync.c")
USER = "postgres"
"""Who runs the server where the benchmark is run by root, whom PostgreSQL refuses."""


def environment(microseconds: int, folder: Path) -> dict[str, str] | None:
    """Return the environment in which each sync takes so much longer, or None where there is no C compiler."""
    compiler = shutil.which("cc")
    if compiler is None:
        return None
    shim = folder / "slowsync.so"
    subprocess.run([compiler, "-O2", "-shared", "-fPIC", "-o", shim, SOURCE, "-ldl"], check=True)
    return {"LD_PRELOAD": str(shim), "SLOWSYNC_US": str(microseconds)}


def _programs() -> Path | None:
    """Return the directory of PostgreSQL's programs, of which Debian has only some on the path."""
    found = shutil.which("pg_ctl")
    folders = [Path(found).parent] if found else sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    return folders[-1] if folders else None


@contextmanager
def postgresql(settings: Mapping[str, str], folder: Path) -> Iterator[str | None]:
    """Run a new server with these settings of the environment, and give its URL; None where PostgreSQL is missing.

    It has the configuration that ``initdb`` makes, which is durable, and is removed afterwards.
    """
    programs = _programs()
    if programs is None:
        yield None
        return
    with tempfile.TemporaryDirectory(dir=folder) as name:
        data = Path(name) / "data"
        user = None
        if os.getuid() == 0:
            user = USER
            os.chown(name, pwd.getpwnam(user).pw_uid, -1)
            shim = shutil.copy(settings["LD_PRELOAD"], name)  # where that user may read it
            Path(shim).chmod(0o755)
            settings = {**settings, "LD_PRELOAD": str(shim)}

        def run(program: str, *arguments: object, **more: str) -> None:
            command = [str(programs / program), "-D", str(data), *map(str, arguments)]
            own = os.environ | more
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd="/", user=user, env=own)

        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        options = f"-p {port} -k {name} -c listen_addresses=127.0.0.1"
        run("initdb", "-U", "postgres", "--auth=trust", "-E", "UTF8", "--locale=C")
        run("pg_ctl", "-w", "-l", Path(name) / "log", "-o", options, "start", **settings)
        try:
            yield f"postgresql://postgres@127.0.0.1:{port}/postgres"
        finally:
            run("pg_ctl", "-w", "-m", "fast", "stop")
