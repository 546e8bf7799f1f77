"""A host's own models, of a metadata of its own, join with runs as docs/sql.md has it."""

from collections.abc import Iterator

import pytest
from sqlalchemy import Engine, ForeignKey, String, create_engine, func, inspect, select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, relationship

from taskruns import TaskPhase, TaskRunHistory, TaskRunRepository, TaskRunRow, schema


class Base(DeclarativeBase):
    pass


class Customer(Base):
    __tablename__ = "host_customers"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(255))


class Order(Base):
    __tablename__ = "host_orders"
    id: Mapped[int] = mapped_column(primary_key=True)
    submission: Mapped[str] = mapped_column(String(255), unique=True)
    customer_id: Mapped[int] = mapped_column(ForeignKey("host_customers.id"))
    customer: Mapped[Customer] = relationship()


@pytest.fixture
def engine(empty_database: str) -> Iterator[Engine]:
    """An engine of the host, on a database that has its tables beside ours."""
    with TaskRunHistory.connect(empty_database) as history:
        history.upgrade()
    engine = create_engine(empty_database)
    Base.metadata.create_all(engine)
    yield engine
    Base.metadata.drop_all(engine)
    engine.dispose()


def order(session: Session, submission: str, *phases: TaskPhase) -> None:
    """Add an order, and a run for each phase, in one transaction."""
    session.add(Order(submission=submission, customer=Customer(name="Zoë")))
    runs = TaskRunRepository(session.connection())
    for phase in phases:
        run = runs.open_run("ship", submission=submission)
        runs.close_run("ship", run.attempt, phase)
    runs.open_run("another task", submission=submission)


def test_orders_join_with_their_runs(engine: Engine) -> None:
    with Session(engine) as session, session.begin():
        order(session, "order-17", TaskPhase.FAILED, TaskPhase.SUCCEEDED)
        order(session, "ORDER-18", TaskPhase.TIMEOUT)
        order(session, "order-19")
    joined = select(Order, TaskRunRow).join(TaskRunRow, TaskRunRow.submission == Order.submission)
    joined = joined.where(TaskRunRow.task_id == "ship").order_by(TaskRunRow.attempt)
    with Session(engine) as session:
        found = [
            (order.submission, order.customer.name, row.attempt, row.phase) for order, row in session.execute(joined)
        ]
    assert found == [
        ("order-17", "Zoë", 1, TaskPhase.FAILED),
        ("order-17", "Zoë", 2, TaskPhase.SUCCEEDED),
        ("ORDER-18", "Zoë", 3, TaskPhase.TIMEOUT),
    ]


def test_order_and_run_are_undone_together(engine: Engine) -> None:
    with Session(engine) as session:
        order(session, "order-17", TaskPhase.FAILED)
        session.flush()
        session.rollback()
        counts = [session.scalar(select(func.count()).select_from(model)) for model in (Order, TaskRunRow)]
    assert counts == [0, 0]


def test_metadata_of_the_host_makes_its_own_tables_only(empty_database: str) -> None:
    engine = create_engine(empty_database)
    Base.metadata.create_all(engine)
    assert not set(inspect(engine).get_table_names()) & set(schema.metadata.tables)
    Base.metadata.drop_all(engine)
    engine.dispose()
