"""Create supervisors."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import mysql

revision = "1_0002"
down_revision = "1_0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create the table."""
    time = sa.DateTime(timezone=True).with_variant(mysql.DATETIME(fsp=6), "mysql", "mariadb")
    op.create_table(
        "supervisors",
        sa.Column("id", sa.BigInteger(), autoincrement=False, nullable=False, comment="A random number"),
        sa.Column("source", sa.String(255), nullable=False, comment="What it marks its runs with"),
        sa.Column(
            "stream",
            sa.Boolean(),
            nullable=False,
            server_default=sa.false(),
            comment="Whether it records what another process tells of its runs",
        ),
        sa.Column("host", sa.String(255), nullable=False, comment="The name of its host"),
        sa.Column(
            "boot_id", sa.String(36), comment="The start of the host's kernel since which its process numbers hold"
        ),
        sa.Column(
            "pid_namespace",
            sa.BigInteger(),
            comment="The namespace of its process number: each container has its own",
        ),
        sa.Column("pid", sa.BigInteger(), nullable=False, comment="The number of its process"),
        sa.Column("process_started", sa.BigInteger(), comment="When its process started, in clock ticks since boot"),
        sa.Column("started_at", time, nullable=False, comment="When it was registered, by the database's clock, UTC"),
        sa.Column("heartbeat_at", time, nullable=False, comment="When it last beat, by the database's clock, UTC"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_supervisors")),
        comment="The processes that watch over active runs",
        sqlite_with_rowid=False,
        mysql_charset="utf8mb4",
        mysql_collate="utf8mb4_bin",
        mariadb_charset="utf8mb4",
        mariadb_collate="utf8mb4_bin",
        # MariaDB cannot take back what was done before a failure, so a second try has to find it.
        if_not_exists=op.get_context().dialect.name in ("mysql", "mariadb"),
    )


def downgrade() -> None:
    """Drop the table: nobody watches over the active runs any more."""
    op.drop_table("supervisors")
