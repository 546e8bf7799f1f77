"""Where a file lies, and who may do what with it."""

import os
import re
import shlex
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from taskruns.cli.finding import Finding, Findings

NETWORK = {
    *("nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "afs", "ceph", "lustre", "gpfs", "beegfs", "ocfs2", "gfs2"),
    *("fuse.sshfs", "fuse.glusterfs", "fuse.cephfs", "fuse.ceph", "fuse.rclone", "fuse.s3fs", "fuse.davfs"),
}
LAYERED = {"overlay", "aufs", "fuse.fuse-overlayfs"}
IN_MEMORY = {"tmpfs", "ramfs"}

LEAST_FREE = 64 * 1024 * 1024
"""Bytes on the disk below which it counts as full."""


def place(path: Path) -> Findings:
    """Say on what kind of file system a file lies, or will lie."""
    path = Path(os.path.realpath(path))
    mount, kind = mount_of(path)
    if kind in NETWORK:
        yield Finding(
            "place",
            "problem",
            f"{path} is on a network file system ({kind} at {mount}), where SQLite's WAL and locks do not work",
            "move it to a local disk, or use PostgreSQL or MariaDB to share it between hosts",
        )
    elif kind in LAYERED and mount == Path("/") and in_container():
        yield Finding(
            "place",
            "problem",
            f"{path} is in the container's own layer, and is lost with the container",
            "mount a volume there, or name a server by TASKRUNS_DB",
        )
    elif kind in IN_MEMORY:
        yield Finding("place", "note", f"{path} is in memory ({kind} at {mount}), and is lost when the machine stops")
    elif path.is_relative_to("/tmp") or path.is_relative_to("/var/tmp"):  # noqa: S108  (nothing is put there)
        yield Finding("place", "note", f"{path} is among the temporary files, which the system may remove")
    elif kind:
        yield Finding("place", "ok", f"on a local file system ({kind} at {mount})")


def mount_of(path: Path) -> tuple[Path, str]:
    """Return the mount point of a resolved path and its kind of file system; an empty kind if it is not known."""
    found, kind = Path("/"), ""
    for point, its_kind in _mounts():
        if path.is_relative_to(point) and len(point.parts) >= len(found.parts):  # a later mount covers an earlier one
            found, kind = point, its_kind
    return found, kind


def _mounts() -> Iterator[tuple[Path, str]]:
    for line in mountinfo().splitlines():
        mounted, _, source = line.partition(" - ")
        point = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), mounted.split(" ")[4])
        yield Path(point), source.split(" ")[0]


def mountinfo() -> str:
    """Return what the kernel says of the mounts; nothing where it is not Linux."""
    try:
        return Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return ""


def in_container() -> bool:
    """Whether this process seems to be in a container."""
    if Path("/.dockerenv").exists() or Path("/run/.containerenv").exists() or "container" in os.environ:
        return True
    try:
        groups = Path("/proc/1/cgroup").read_text(encoding="utf-8")
    except OSError:
        return False
    return re.search("docker|kubepods|containerd|libpod|lxc", groups) is not None


def file(path: Path) -> Findings:
    """Say whether the file of an SQLite database is there, whose it is, who may write it, and what space is left."""
    if not path.exists():
        yield Finding("file", "note", f"{path} does not exist yet: the first command that records a run makes it")
        yield from writable(path)
    elif not path.is_file():
        yield Finding("file", "problem", f"{path} is not a file", "name another one")
        return
    else:
        yield from _permissions(path)
        yield from _writable_with_its_log(path)
    free = shutil.disk_usage(existing(path)).free
    if free < LEAST_FREE:
        yield Finding("space", "problem", f"the disk has only {size(free)} left", "make room there, or move the file")
    else:
        yield Finding("space", "ok", f"the disk has {size(free)} left")


def _permissions(path: Path) -> Findings:
    mode = stat.S_IMODE(path.stat().st_mode)
    message = f"{path} is {_owner(path)}'s, with mode {mode:04o}"
    if mode & 0o077:
        who = "everybody" if mode & 0o007 else "its group"
        what = "write" if mode & 0o022 else "read"
        advice = f"unless that is meant, `chmod 600 {shlex.quote(str(path))}`"
        yield Finding("permissions", "note", f"{message}: {who} may {what} it", advice)
    else:
        yield Finding("permissions", "ok", message)
    folder = path.parent.stat().st_mode
    if folder & stat.S_IWOTH and not folder & stat.S_ISVTX:
        advice = f"`chmod o-w {shlex.quote(str(path.parent))}`"
        yield Finding("permissions", "problem", f"everybody may remove or replace files in {path.parent}", advice)


def _writable_with_its_log(path: Path) -> Findings:
    """Look at the files that SQLite keeps beside the database too: root's leave everybody else out."""
    for each in (Path(f"{path}{suffix}") for suffix in ("", "-wal", "-shm")):
        if each.exists() and not os.access(each, os.R_OK | os.W_OK):
            message = f"this user may not write {each}, which is {_owner(each)}'s: nothing can be recorded"
            yield Finding("writable", "problem", message, "change its owner or its mode, or name another database")
            return
    yield from writable(path)


def writable(path: Path) -> Findings:
    """Say whether this user may make files beside ``path``, and the directories that are missing for it."""
    folder = existing(path.parent)
    if not folder.is_dir():
        yield Finding("writable", "problem", f"{folder} is not a directory", "name another place")
    elif not os.access(folder, os.W_OK | os.X_OK):
        message = f"this user may not make files in {folder}, which is {_owner(folder)}'s"
        yield Finding("writable", "problem", message, "change its owner or its mode, or name another place")
    else:
        yield Finding("writable", "ok", "this user may write there")


def existing(path: Path) -> Path:
    """Return the path, or the nearest one above it that exists."""
    while not os.path.exists(path) and path != path.parent:  # noqa: PTH110  (false where this user may not look)
        path = path.parent
    return path


def _owner(path: Path) -> str:
    """Return whose it is: a name, or a number where the user has none."""
    try:
        return path.owner()
    except (KeyError, NotImplementedError):
        return f"user {path.stat().st_uid}"


def size(count: float) -> str:
    """Return a number of bytes as people read it."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:  # noqa: PLR2004  (the step of the units)
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
