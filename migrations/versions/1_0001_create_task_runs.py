"""Create task_runs."""

from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import mysql

revision = "1_0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create the table and its indexes."""
    # MariaDB cannot take back what was done before a failure, so a second try has to find it.
    offline = op.get_context().as_sql
    present = set() if offline else {index["name"] for index in _indexes(op.get_bind())}
    time = sa.DateTime(timezone=True).with_variant(mysql.DATETIME(fsp=6), "mysql", "mariadb")
    op.create_table(
        "task_runs",
        sa.Column(
            "task_id",
            sa.String(255).with_variant(sa.String(255, collation="C"), "postgresql"),
            nullable=False,
            comment="The recurring task; compared byte for byte",
        ),
        sa.Column(
            "attempt",
            sa.BigInteger(),
            autoincrement=False,
            nullable=False,
            comment="Number of the run within its task, from 1 to 4294967295",
        ),
        sa.Column(
            "phase",
            sa.String(16),
            nullable=False,
            comment="running while active, else succeeded, failed, timeout, canceled or exhausted",
        ),
        sa.Column("started_at", time, nullable=False, comment="When the run started, UTC"),
        sa.Column("finished_at", time, comment="When the run ended, UTC; null exactly while it is active"),
        sa.Column(
            "error",
            sa.Text().with_variant(mysql.MEDIUMTEXT(), "mysql", "mariadb"),
            comment="What went wrong; null for a run that is active or succeeded",
        ),
        sa.Column(
            "exit_code", sa.Integer(), comment="What a shell would show in $?: 128+N for signal N, 124 for a timeout"
        ),
        sa.Column(
            "recovered",
            sa.Boolean(),
            nullable=False,
            server_default=sa.false(),
            comment="Whether the outcome was inferred, not observed",
        ),
        sa.Column(
            "start_inferred",
            sa.Boolean(),
            nullable=False,
            server_default=sa.false(),
            comment="Whether started_at was inferred from the end, not observed",
        ),
        sa.Column("source", sa.String(255), comment="The host, or the name given to a stream"),
        sa.Column("submission", sa.String(255), comment="What ties the attempts of one submission together"),
        sa.Column("source_attempt", sa.BigInteger(), comment="The own attempt counter of the source"),
        sa.Column("supervisor_id", sa.BigInteger(), comment="Who watches over the run while it is active"),
        sa.PrimaryKeyConstraint("task_id", "attempt", name=op.f("pk_task_runs")),
        sa.CheckConstraint("attempt BETWEEN 1 AND 4294967295", name=op.f("ck_task_runs_attempt")),
        sa.CheckConstraint(
            "phase IN ('running', 'succeeded', 'failed', 'timeout', 'canceled', 'exhausted')",
            name=op.f("ck_task_runs_phase"),
        ),
        sa.CheckConstraint("(phase = 'running') = (finished_at IS NULL)", name=op.f("ck_task_runs_active")),
        sa.CheckConstraint("finished_at >= started_at", name=op.f("ck_task_runs_times")),
        sa.CheckConstraint("error IS NULL OR phase NOT IN ('running', 'succeeded')", name=op.f("ck_task_runs_error")),
        comment="One row for every attempt of every task",
        sqlite_with_rowid=False,
        mysql_charset="utf8mb4",
        mysql_collate="utf8mb4_bin",
        mariadb_charset="utf8mb4",
        mariadb_collate="utf8mb4_bin",
        if_not_exists=True,
    )
    indexes: list[tuple[str, list[Any], str | None]] = [("ix_task_runs_started", ["started_at"], None)]
    if op.get_context().dialect.name in ("sqlite", "postgresql"):
        indexes += [
            ("ix_task_runs_active", ["started_at"], "finished_at IS NULL"),
            ("ix_task_runs_problems", ["finished_at"], "phase IN ('failed', 'timeout', 'exhausted')"),
        ]
    else:
        indexes += [("ix_task_runs_finished", [sa.text("finished_at DESC"), "phase"], None)]
    for name, columns, condition in indexes:
        if name not in present:
            where = None if condition is None else sa.text(condition)
            op.create_index(name, "task_runs", columns, sqlite_where=where, postgresql_where=where)


def _indexes(bind: sa.Connection) -> Sequence[Any]:
    inspector = sa.inspect(bind)
    return inspector.get_indexes("task_runs") if inspector.has_table("task_runs") else []


def downgrade() -> None:
    """Drop the table, and with it the history."""
    op.drop_table("task_runs")
