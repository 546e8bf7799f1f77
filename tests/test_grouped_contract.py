"""The rules of a run hold with group commit, and where every call is written as a batch of one."""

import asyncio
from collections.abc import Iterator

import pytest
from histories import Histories
from test_contract import (
    test_attempt_that_exists_is_not_opened_again,
    test_attempts_count_up_within_each_task,
    test_close_before_the_start_is_clamped_to_it,
    test_close_stores_the_outcome,
    test_closing_a_run_that_does_not_exist_is_an_error,
    test_exhausted_fills_what_failed_left_empty,
    test_given_attempt_may_leave_a_gap_and_numbering_goes_on_from_it,
    test_inferred_outcome_gives_way_to_the_real_one,
    test_lower_rank_that_comes_later_changes_nothing,
    test_open_keeps_every_field,
    test_same_start_told_twice_gives_the_stored_run,
    test_the_highest_attempt_uses_up_the_numbers,
    test_the_store_numbers_the_same_time_anew_when_no_number_is_told,
    test_times_come_back_to_the_microsecond_in_utc,
)
from test_later_starts import (
    test_later_start_closes_the_earlier_run_of_the_same_supervisor,
    test_real_outcome_replaces_that_of_a_later_start,
    test_runs_of_two_histories_overlap,
    test_start_that_is_not_later_closes_nothing,
)
from test_recording import test_body_that_ends_well_is_succeeded, test_exceptions_are_stored_on_every_database

from taskruns.commit import Writer

__all__ = [
    "test_attempt_that_exists_is_not_opened_again",
    "test_attempts_count_up_within_each_task",
    "test_body_that_ends_well_is_succeeded",
    "test_close_before_the_start_is_clamped_to_it",
    "test_close_stores_the_outcome",
    "test_closing_a_run_that_does_not_exist_is_an_error",
    "test_exceptions_are_stored_on_every_database",
    "test_exhausted_fills_what_failed_left_empty",
    "test_given_attempt_may_leave_a_gap_and_numbering_goes_on_from_it",
    "test_inferred_outcome_gives_way_to_the_real_one",
    "test_later_start_closes_the_earlier_run_of_the_same_supervisor",
    "test_lower_rank_that_comes_later_changes_nothing",
    "test_open_keeps_every_field",
    "test_real_outcome_replaces_that_of_a_later_start",
    "test_runs_of_two_histories_overlap",
    "test_same_start_told_twice_gives_the_stored_run",
    "test_start_that_is_not_later_closes_nothing",
    "test_the_highest_attempt_uses_up_the_numbers",
    "test_the_store_numbers_the_same_time_anew_when_no_number_is_told",
    "test_times_come_back_to_the_microsecond_in_utc",
]


@pytest.fixture(params=["sync", pytest.param("async", marks=pytest.mark.soak)])  # they have one writer
def histories(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Histories]:
    """Connects histories with group commit, sync and async, whose lone calls are written as batches are."""
    monkeypatch.setattr(Writer, "_write_one", lambda self, connection, call: self._write_all(connection, [call]))
    with asyncio.Runner() as runner:
        found = Histories(runner if request.param == "async" else None, group_commit=True)
        yield found
        found.close()
