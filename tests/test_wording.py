"""Facts as people read them."""

from datetime import timedelta

import pytest

from taskruns.wording import compact, last_line, readable


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        *((-5, "0.000 s"), (0.25, "0.250 s"), (59.94, "59.9 s"), (59.95, "1m 00s"), (3599.6, "1h 00m")),
        *((26 * 3600, "26h 00m"), (172799, "47h 59m"), (172799.6, "2d 00h"), (349200, "4d 01h")),
    ],
)
def test_span_is_told_in_two_units_of_time(seconds: float, text: str) -> None:
    assert readable(timedelta(seconds=seconds)) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        *((-5, "0s"), (0.9, "0s"), (59.9, "59s"), (60, "1m"), (3599, "59m"), (3600, "1h"), (172799, "47h")),
        *((172800, "2d"), (999 * 86400, "999d"), (1000 * 86400, "2y")),
    ],
)
def test_age_is_told_in_one_unit(seconds: float, text: str) -> None:
    assert compact(timedelta(seconds=seconds)) == text


@pytest.mark.parametrize("error", ["last", "first\nlast\n", " last \r\n \n", "first\rlast"])
def test_last_line_of_an_error_that_says_something(error: str) -> None:
    assert last_line(error) == "last"


@pytest.mark.parametrize("error", [None, "", " \n\t\n"])
def test_error_that_says_nothing_has_no_last_line(error: str | None) -> None:
    assert last_line(error) == ""
