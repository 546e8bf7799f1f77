"""Windows of time, moments and time zones, as people write them."""

import sys
import zoneinfo
from collections.abc import Iterator
from datetime import UTC, date, datetime, time, timedelta, timezone, tzinfo
from zoneinfo import ZoneInfo

import pytest
from hypothesis import example, given, strategies as st

from taskruns.times import parse_duration
from taskruns.windows import Window, parse_moment, parse_window, parse_zone

NOW = datetime(2026, 11, 10, 12, 30, 15, 250_000, UTC)
BERLIN = ZoneInfo("Europe/Berlin")
SAO_PAULO = ZoneInfo("America/Sao_Paulo")
ZONES = [UTC, BERLIN, SAO_PAULO, ZoneInfo("Asia/Kolkata"), ZoneInfo("Australia/Lord_Howe"), ZoneInfo("Pacific/Apia")]
MOMENTS = st.integers(1_100_000_000, 2_100_000_000).map(lambda seconds: datetime.fromtimestamp(seconds, UTC))
CLOCKS = st.builds(time, st.integers(0, 23), st.integers(0, 59))


def at(text: str | None) -> datetime | None:
    return None if text is None else datetime.fromisoformat(text).replace(tzinfo=UTC)


def in_berlin(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=BERLIN)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("now", "2026-11-10T12:30:15.250"),
        ("15s", "2026-11-10T12:30:00.250"),
        ("250ms", "2026-11-10T12:30:15"),
        ("90m", "2026-11-10T11:00:15.250"),
        ("1.5h", "2026-11-10T11:00:15.250"),
        ("7d", "2026-11-03T12:30:15.250"),
        ("2w", "2026-10-27T12:30:15.250"),
        ("0s", "2026-11-10T12:30:15.250"),
        ("today", "2026-11-10"),
        ("yesterday", "2026-11-09"),
        ("2026-11-01", "2026-11-01"),
        (" 2026-11-01 ", "2026-11-01"),
        ("2026-11-01T02:00", "2026-11-01T02:00"),
        ("2026-11-01 02:00:05.25", "2026-11-01T02:00:05.250"),
        ("2026-11-01t02:00:05z", "2026-11-01T02:00:05"),
        ("2026-11-01T02:00+05:30", "2026-10-31T20:30"),
        ("2026-11-01T02:00-0300", "2026-11-01T05:00"),
        ("2099-01-01", "2099-01-01"),
        ("02:00", "2026-11-10T02:00"),
        ("12:30:15.25", "2026-11-10T12:30:15.250"),
        ("12:30:16", "2026-11-09T12:30:16"),
        ("23:00", "2026-11-09T23:00"),
        ("00:00", "2026-11-10"),
    ],
)
def test_a_moment(text: str, expected: str) -> None:
    moment = parse_moment(text, now=NOW)
    assert moment == at(expected)
    assert moment.tzinfo is UTC


@pytest.mark.parametrize(
    ("text", "since", "until"),
    [
        ("7d", "2026-11-03T12:30:15.250", None),
        ("now", "2026-11-10T12:30:15.250", None),
        ("today", "2026-11-10", "2026-11-11"),
        ("yesterday", "2026-11-09", "2026-11-10"),
        ("2026-11-01", "2026-11-01", "2026-11-02"),
        ("2026-11-01T02:00", "2026-11-01T02:00", None),
        ("02:00", "2026-11-10T02:00", None),
        ("2026-11-01..2026-11-08", "2026-11-01", "2026-11-09"),
        ("2026-11-01 .. 2026-11-01", "2026-11-01", "2026-11-02"),
        ("2026-11-01..", "2026-11-01", None),
        ("..2026-11-01", None, "2026-11-02"),
        ("yesterday..today", "2026-11-09", "2026-11-11"),
        ("yesterday..now", "2026-11-09", "2026-11-10T12:30:15.250"),
        ("yesterday..02:00", "2026-11-09", "2026-11-09T02:00"),
        ("today..18:00", "2026-11-10", "2026-11-10T18:00"),
        ("2026-11-01..02:00", "2026-11-01", "2026-11-01T02:00"),
        ("2026-11-01..00:00", "2026-11-01", "2026-11-02"),
        ("2h..02:00", "2026-11-10T10:30:15.250", "2026-11-11T02:00"),
        ("11h..02:00", "2026-11-10T01:30:15.250", "2026-11-10T02:00"),
        ("now..18:00", "2026-11-10T12:30:15.250", "2026-11-10T18:00"),
        ("now..now", "2026-11-10T12:30:15.250", "2026-11-10T12:30:15.250"),
        ("2h..1h", "2026-11-10T10:30:15.250", "2026-11-10T11:30:15.250"),
        ("2h..", "2026-11-10T10:30:15.250", None),
        ("..2h", None, "2026-11-10T10:30:15.250"),
        ("..02:00", None, "2026-11-10T02:00"),
        ("02:00..03:00", "2026-11-10T02:00", "2026-11-10T03:00"),
        ("12:00..13:00", "2026-11-10T12:00", "2026-11-10T13:00"),
        ("23:00..01:00", "2026-11-09T23:00", "2026-11-10T01:00"),
        ("02:00..02:00", "2026-11-10T02:00", "2026-11-11T02:00"),
        ("02:00..now", "2026-11-10T02:00", "2026-11-10T12:30:15.250"),
        ("2026-11-01T23:00..01:00", "2026-11-01T23:00", "2026-11-02T01:00"),
        ("2026-11-01T23:00..23:30:00.5", "2026-11-01T23:00", "2026-11-01T23:30:00.500"),
        ("2026-11-01T23:00..2026-11-03T01:00Z", "2026-11-01T23:00", "2026-11-03T01:00"),
        ("2026-11-01 02:00:05.25..2026-11-01", "2026-11-01T02:00:05.250", "2026-11-02"),
    ],
)
def test_a_window(text: str, since: str | None, until: str | None) -> None:
    assert parse_window(text, now=NOW) == Window(at(since), at(until))


@pytest.mark.parametrize(
    ("now", "text", "since", "until"),
    [
        ("2026-11-10T00:30", "today", "2026-11-10T00:00+01:00", "2026-11-11T00:00+01:00"),
        ("2026-03-29T12:00", "today", "2026-03-29T00:00+01:00", "2026-03-30T00:00+02:00"),
        ("2026-10-25T12:00", "today", "2026-10-25T00:00+02:00", "2026-10-26T00:00+01:00"),
        ("2026-10-26T12:00", "yesterday", "2026-10-25T00:00+02:00", "2026-10-26T00:00+01:00"),
        # Clocks went back at three: it was half past two twice, and at last by winter time.
        ("2026-10-25T12:00", "02:30", "2026-10-25T02:30+01:00", None),
        ("2026-10-25T02:45", "02:30", "2026-10-25T02:30+02:00", None),
        ("2026-10-25T12:00", "2026-10-25T02:30..", "2026-10-25T02:30+02:00", None),
        ("2026-10-25T12:00", "2026-10-25T02:45+02:00..02:30", "2026-10-25T02:45+02:00", "2026-10-25T02:30+01:00"),
        # From one time of day until another it is all that clocks showed in between.
        ("2026-10-25T12:00", "02:00..03:00", "2026-10-25T02:00+02:00", "2026-10-25T03:00+01:00"),
        ("2026-10-25T12:00", "02:30..02:40", "2026-10-25T02:30+02:00", "2026-10-25T02:40+01:00"),
        ("2026-10-25T02:45", "02:30..02:40", "2026-10-25T02:30+02:00", "2026-10-25T02:40+01:00"),
        ("2026-10-25T12:00", "today..02:30", "2026-10-25T00:00+02:00", "2026-10-25T02:30+01:00"),
        ("2026-10-25T12:00", "2026-10-25T02:00..03:00", "2026-10-25T02:00+02:00", "2026-10-25T03:00+01:00"),
        # They went forward at two: half past two was never, and is taken for half past three.
        ("2026-03-29T12:00", "2026-03-29T02:30..", "2026-03-29T03:30+02:00", None),
        ("2026-03-29T12:00", "02:30..04:00", "2026-03-29T03:30+02:00", "2026-03-29T04:00+02:00"),
        ("2026-03-29T12:00", "01:00..02:30", "2026-03-29T01:00+01:00", "2026-03-29T03:30+02:00"),
        ("2026-03-29T12:00", "02:00..03:00", "2026-03-29T03:00+02:00", "2026-03-29T03:00+02:00"),
        ("2026-03-29T12:00", "02:30..02:45", "2026-03-29T03:30+02:00", "2026-03-29T03:30+02:00"),
        ("2026-03-29T12:00", "2026-03-29T02:00..03:00", "2026-03-29T03:00+02:00", "2026-03-29T03:00+02:00"),
        ("2026-03-29T12:00", "1d..", "2026-03-28T11:00+01:00", None),
        ("2026-03-29T12:00", "2026-03-29T02:30Z..", "2026-03-29T02:30+00:00", None),
    ],
)
def test_a_window_of_a_time_zone(now: str, text: str, since: str, until: str | None) -> None:
    window = parse_window(text, now=in_berlin(now), zone=BERLIN)
    assert (window.since, window.until) == (
        datetime.fromisoformat(since),
        None if until is None else datetime.fromisoformat(until),
    )


@given(st.sampled_from(ZONES), MOMENTS, st.integers(-100_000, 100_000))
@example(BERLIN, datetime(2026, 3, 28, 23, tzinfo=UTC), -1)
@example(BERLIN, datetime(2026, 10, 25, 22, 59, 59, tzinfo=UTC), 1)
@example(SAO_PAULO, datetime(2018, 11, 4, 3, tzinfo=UTC), -1)  # a midnight that clocks skipped
@example(SAO_PAULO, datetime(2018, 2, 18, 2, 30, tzinfo=UTC), 3600)  # the hour before midnight was there twice
@example(ZONES[-1], datetime(2011, 12, 30, 10, tzinfo=UTC), -1)  # a day that was left out
def test_a_day_holds_exactly_the_moments_of_that_date(zone: tzinfo, moment: datetime, seconds: int) -> None:
    other = moment + timedelta(seconds=seconds)
    day = moment.astimezone(zone).date()
    window = parse_window(day.isoformat(), now=NOW, zone=zone)
    assert window.contains(moment)
    assert window.contains(other) == (other.astimezone(zone).date() == day)
    assert parse_window("today", now=moment, zone=zone) == window


@given(st.sampled_from(ZONES), st.dates(date(2005, 1, 1), date(2037, 1, 1)))
@example(BERLIN, date(2026, 3, 28))
@example(SAO_PAULO, date(2018, 11, 3))
@example(ZONES[-1], date(2011, 12, 29))
def test_every_day_begins_where_the_one_before_ends(zone: tzinfo, day: date) -> None:
    following = day + timedelta(days=1)
    windows = [parse_window(each.isoformat(), now=NOW, zone=zone) for each in (day, following)]
    assert windows[0].until == windows[1].since
    assert parse_window(f"{day}..{following}", now=NOW, zone=zone) == Window(windows[0].since, windows[1].until)


@given(st.sampled_from(ZONES), MOMENTS, CLOCKS, CLOCKS)
@example(ZONES[-1], datetime(2011, 12, 30, 10, 30, tzinfo=UTC), time(), time(23, 59))
def test_times_of_day_are_the_last_and_the_next(zone: tzinfo, now: datetime, left: time, right: time) -> None:
    window = parse_window(f"{left}..{right}", now=now, zone=zone)
    assert window.since is not None
    assert window.until is not None
    assert window.since <= now
    assert now - window.since < timedelta(days=2, hours=2)
    assert timedelta(0) <= window.until - window.since <= timedelta(days=1, hours=2)


NO_TIMES = [
    *[
        "",
        " ",
        "lastweek",
        "7",
        "1.5",
        "-7d",
        "7 d",
        "7y",
        "Today",
        "tomorrow",
        "d",
        "1e3s",
        "2026",
        "2026-11",
        "20261101",
    ],
    *["2026-11-1", "2026-11-31", "2026-02-30", "0000-01-01", "2026-13-01", "2026-11-01T", "2026-11-01T2:00", "2:00"],
    *["24:00", "02:60", "02:00:60", "02", "02:00Z", "2026-11-01T25:00", "2026-11-01T02:00+25:00", "2026-11-01T02:00 Z"],
    *[
        "\uff12026-11-01",
        "\uff17d",
        "\u0660\u0662:00",
        "2026-11-01\0",
        "2026-11-01T02:00:05.",
        "2026-11-01T02:00:05,5",
        "2026-W45-1",
    ],
]


@pytest.mark.parametrize("text", NO_TIMES)
def test_what_is_no_time_is_told_what_is(text: str) -> None:
    expected = f"{text.strip()!r} is not a time, such as 7d, today, 2026-11-01 or 2026-11-01T02:00"
    with pytest.raises(ValueError) as caught:
        parse_moment(text, now=NOW)
    assert str(caught.value) == expected
    with pytest.raises(ValueError, match=r"is not a (time|window of time), such as 7d, "):
        parse_window(text, now=NOW)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("..", "'..' is not a window of time, such as"),
        (" .. ", "' .. ' is not a window of time, such as"),
        ("soon", "'soon' is not a window of time, such as 7d, yesterday, 2026-11-01..2026-11-08 or 2h..1h"),
        ("lastweek..today", "'lastweek..today' is not a window of time, such as"),
        ("2026-11-01..soon", "'2026-11-01..soon' is not a window of time, such as"),
        ("2026-11-01...2026-11-08", "'2026-11-01...2026-11-08' is not a window of time, such as"),
        ("1d..2h..1h", "'1d..2h..1h' is not a window of time, such as"),
        ("1h..2h", "'1h..2h' ends before it begins"),
        ("2026-11-02..2026-11-01", "'2026-11-02..2026-11-01' ends before it begins"),
        ("2026-11-08..2026-11-01", "'2026-11-08..2026-11-01' ends before it begins"),
        ("now..yesterday", "'now..yesterday' ends before it begins"),
        ("40000d", "'40000d' is longer than a century"),
        ("9" * 400 + "w", "is longer than a century"),
        ("1.2.3d", "'1.2.3d' is not a duration, such as"),
        ("9999-12-31", "'9999-12-31' is out of range"),
        ("9999-12-31..00:00", "'9999-12-31..00:00' is out of range"),
        ("9999-12-31T23:59-01:00", "'9999-12-31T23:59-01:00' is out of range"),
        ("0001-01-01T00:00+01:00", "'0001-01-01T00:00+01:00' is out of range"),
    ],
)
def test_what_is_no_window_is_told_why(text: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_window(text, now=NOW)
    assert message in str(caught.value)


@pytest.mark.parametrize("now", [datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC)])
@pytest.mark.parametrize("text", ["1d", "today", "yesterday", "02:00", "02:00..03:00", "..1d"])
@pytest.mark.parametrize("zone", ZONES, ids=str)
def test_the_ends_of_time_are_a_value_error_or_nothing(text: str, now: datetime, zone: tzinfo) -> None:
    try:
        parse_window(text, now=now, zone=zone)
    except ValueError as error:
        assert "is out of range" in str(error)  # noqa: PT017  (most of these are, not all)


@given(st.text("0123456789-:.TZ+ dhwmsnowtayer", max_size=24))
def test_any_text_is_a_window_or_a_value_error(text: str) -> None:
    try:
        window = parse_window(text, now=NOW, zone=BERLIN)
    except ValueError:
        return
    assert window != Window()


def test_a_naive_now_is_refused() -> None:
    with pytest.raises(ValueError, match="now must be an aware datetime"):
        parse_window("7d", now=NOW.replace(tzinfo=None))


def test_a_window_includes_its_beginning_and_not_its_end() -> None:
    window = Window(NOW, NOW + timedelta(hours=1))
    assert window.contains(NOW)
    assert not window.contains(NOW - timedelta.resolution)
    assert window.contains(NOW + timedelta(hours=1) - timedelta.resolution)
    assert not window.contains(NOW + timedelta(hours=1))
    assert not Window(NOW, NOW).contains(NOW)
    assert Window().contains(NOW)


def test_a_window_is_kept_in_utc() -> None:
    window = Window(NOW.astimezone(timezone(timedelta(hours=2))))
    assert window == Window(NOW)
    assert window.since is not None
    assert window.since.tzinfo is UTC


def test_a_window_refuses_what_is_none() -> None:
    with pytest.raises(ValueError, match="ends before it begins"):
        Window(NOW, NOW - timedelta.resolution)
    with pytest.raises(ValueError, match="until must be an aware datetime"):
        Window(until=NOW.replace(tzinfo=None))


def test_weeks_are_durations() -> None:
    assert parse_duration("2w") == timedelta(days=14)


def test_a_time_zone_by_its_name() -> None:
    assert parse_zone("Europe/Berlin") is ZoneInfo("Europe/Berlin")
    assert parse_zone("UTC") is UTC


NO_ZONES = [
    "",
    "../x",
    "Europe",
    "Europe/",
    "/etc/passwd",
    "Mars/Olympus",
    "a\0b",
    "\udcff",
    "x" * 5000,
    "zone.tab",
    " ",
]


@pytest.mark.parametrize("name", NO_ZONES, ids=lambda name: ascii(name[:20]))
def test_what_is_no_time_zone_is_refused(name: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_zone(name)
    assert str(caught.value) == f"there is no time zone {name!r}; take a name such as Europe/Berlin"


@pytest.fixture
def _no_zones(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(sys.modules, "tzdata", None)
    zoneinfo.reset_tzpath(to=())
    ZoneInfo.clear_cache()
    yield
    zoneinfo.reset_tzpath()


@pytest.mark.usefixtures("_no_zones")
def test_a_system_without_time_zones_still_has_utc() -> None:
    assert parse_zone("UTC") is UTC
    with pytest.raises(ValueError, match="there is no time zone 'Europe/Berlin'; none is known: pip install tzdata"):
        parse_zone("Europe/Berlin")
