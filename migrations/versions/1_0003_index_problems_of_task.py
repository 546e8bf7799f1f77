"""Index the problems of each task."""

import sqlalchemy as sa
from alembic import op

revision = "1_0003"
down_revision = "1_0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create the index; MariaDB and MySQL have none of a part of the rows."""
    if op.get_context().dialect.name not in ("sqlite", "postgresql"):
        return
    where = sa.text("phase IN ('failed', 'timeout', 'exhausted')")
    op.create_index(
        "ix_task_runs_problems_of_task",
        "task_runs",
        ["task_id", "attempt"],
        sqlite_where=where,
        postgresql_where=where,
    )


def downgrade() -> None:
    """Drop the index."""
    if op.get_context().dialect.name in ("sqlite", "postgresql"):
        op.drop_index("ix_task_runs_problems_of_task", "task_runs")
