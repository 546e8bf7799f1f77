"""Shell patterns: as fnmatch has them, and the same on every database."""

import random
import re
import sqlite3
import time
from fnmatch import fnmatchcase
from typing import Any

import pytest
from hypothesis import example, given, strategies as st
from sqlalchemy import Column, MetaData, String, Table, create_engine, insert, select

from taskruns.globs import MAX_GLOB_LENGTH, Glob, is_glob, upper_bound
from taskruns.url import parse_url

ALPHABET = "*?[]!^-\\a b.é😀_%$|(){}+01"
PATTERNS = st.text(ALPHABET + "cz:=#&~/,09AZ\n\u2028", max_size=12)
TEXTS = st.text(ALPHABET + "cz:\n\u2028", max_size=6)

ODD_PATTERNS = [
    *[
        "",
        "*",
        "**",
        "?",
        "??",
        "a*",
        "*a",
        "*a*",
        "a*b",
        "*a*b*",
        "a?b",
        "A",
        "a b*",
        "%",
        "_",
        "a%",
        "***:a",
        "(?i)a",
    ],
    *["[", "[]", "[!", "[!]", "[^", "a[", "[a", "[[", "]", "[]]", "[!]]", "[]a]", "[]-a]", "[!]-a]", "[a]b]", "[[]"],
    *["[ab]", "[!ab]", "[^ab]", "[!^]", "[^]", "[a^]", "[a!]", "[!!]", "[*]", "[?]", "a[*]b", "[*]*", "[*?]", "[-]"],
    *["[a-c]", "[!a-c]", "[a-]", "[-a]", "[!-a]", "[--a]", "[a--]", "[+--]", "[a-c-z]", "[!--a]", "[^-a]", "[^-é]"],
    *["[c-a]", "[!c-a]", "[c-ab]", "[!c-ab]", "x[c-a]*", "[c-a!]", "[c-a!b]", "[c-a!-z]", "[c-a-c]", "[z-a^b]"],
    *["[Z-a]", "[!Z-a]", "[]-]", "[]-^]", "[^-]]", "[\\]", "[\\]]", "[\\a]", "\\", "\\*", "\\d", "[\\d]", "[!\\]"],
    *["[:a:]", "[[:a:]]", "[.a.]", "[=a=]", "[[.a.]]", "[a&&b]", "[a||b]", "[a~~b]", "[a--b]", "[ -~]", "[!-~]"],
    *["é", "[é]", "[a-é]", "[é-😀]", "😀*", "?😀", "[!é]", "[a-😀]", ".", "$", "^a", "a$", "a|b", "(a)", "{a}", "a+"],
    *["a{2}", "#a", "*[ab]*[!a]?", "*?*", "*??*a", "*a?b*", "*\\*", "*[]]*", "a*[!b]*c", "\t", "a\n", "*\n", "*\u2028"],
]


def random_patterns() -> list[str]:
    chance = random.Random(5)
    return ["".join(chance.choices(ALPHABET + "*?[]-!", k=chance.randrange(1, 9))) for _ in range(200)]


def random_texts() -> list[str]:
    chance = random.Random(6)
    some = ["".join(chance.choices(ALPHABET, k=chance.randrange(4))) for _ in range(200)]
    return sorted({*ALPHABET, *some, "", "A", "ab", "aab", "aXb", "abc", "a\n", "a\u2028", "***:a", "[:a:]", "a*b"})


@given(PATTERNS, TEXTS)
@example("[b-a!x]", "x")
@example("[b-a!--z]", "-")
@example("a*", "a\n")
def test_the_regular_expression_means_what_fnmatch_does(pattern: str, text: str) -> None:
    expected = fnmatchcase(text, pattern)
    assert Glob(pattern).matches(text) == expected
    assert (re.search(Glob(pattern).regex(), text) is not None) == expected


@given(PATTERNS, st.lists(TEXTS, max_size=5))
@example("job-?", ["job-1"])
@example("[23]", ["1"])
def test_glob_of_sqlite_means_what_fnmatch_does(pattern: str, texts: list[str]) -> None:
    connection = sqlite3.connect(":memory:")
    for text in [*texts, *ALPHABET]:
        found = connection.execute("SELECT ? GLOB ?", (text, Glob(pattern).sqlite())).fetchone()[0]
        assert (found == 1) == fnmatchcase(text, pattern), text
    connection.close()


@given(PATTERNS, TEXTS)
def test_whatever_matches_begins_with_the_prefix(pattern: str, text: str) -> None:
    glob = Glob(pattern)
    if glob.matches(text):
        assert text.startswith(glob.prefix)
        assert glob.literal in (None, text)
    if glob.literal is not None:
        assert glob.matches(glob.literal)
    assert is_glob(pattern) or glob.literal == pattern


@pytest.mark.parametrize(
    ("pattern", "prefix", "literal"),
    [
        ("backup", "backup", "backup"),
        ("backup-*", "backup-", None),
        ("a[*]b", "a*b", "a*b"),
        ("a[*]b?", "a*b", None),
        ("[[]a", "[a", "[a"),
        ("a[", "a[", "a["),
        ("[a-a]", "a", "a"),
        ("[!a]", "", None),
        ("a[c-b]", "a", None),
        ("", "", ""),
    ],
)
def test_a_pattern_tells_what_is_certain(pattern: str, prefix: str, literal: str | None) -> None:
    assert (Glob(pattern).prefix, Glob(pattern).literal) == (prefix, literal)


def test_a_pattern_means_the_same_on_every_database(database: str) -> None:
    url = parse_url(database)
    collation = {"sqlite": None, "postgresql": "C"}.get(url.get_backend_name(), "utf8mb4_bin")
    operator = {"sqlite": "GLOB", "postgresql": "~"}.get(url.get_backend_name(), "REGEXP")
    column = Column("name", String(255, collation=collation))
    charset: dict[str, Any] = {"mariadb_charset": "utf8mb4", "mysql_charset": "utf8mb4"}
    names = Table("names", MetaData(), column, prefixes=["TEMPORARY"], **charset)
    texts = random_texts()
    wrong = []
    engine = create_engine(url)
    with engine.connect() as connection:
        names.create(connection)
        connection.execute(insert(names), [{"name": text} for text in texts])
        for pattern in [*ODD_PATTERNS, *random_patterns()]:
            glob = Glob(pattern)
            asked = glob.sqlite() if operator == "GLOB" else glob.regex()
            found = sorted(connection.scalars(select(column).where(column.op(operator)(asked))))
            if found != [text for text in texts if glob.matches(text)]:
                wrong.append((pattern, asked, found))
    engine.dispose()
    assert wrong == []


def test_many_stars_do_not_make_a_search_slow_or_give_up(database: str) -> None:
    url = parse_url(database)
    operator = {"sqlite": "GLOB", "postgresql": "~"}.get(url.get_backend_name(), "REGEXP")
    glob = Glob("*a?" * 100 + "*[bc]")
    column = Column("name", String(255))
    names = Table("names", MetaData(), column, prefixes=["TEMPORARY"])
    engine = create_engine(url)
    began = time.monotonic()
    with engine.connect() as connection:
        names.create(connection)
        connection.execute(insert(names), [{"name": "a" * 254 + end} for end in "acd" * 20])
        asked = glob.sqlite() if operator == "GLOB" else glob.regex()
        found = connection.scalars(select(column).where(column.op(operator)(asked))).all()
    engine.dispose()
    assert found == ["a" * 254 + "c"] * 20
    assert time.monotonic() - began < 5


def test_stars_are_searched_by_python_in_no_time() -> None:
    began = time.monotonic()
    assert not re.search(Glob("*a" * 100 + "*[bc]").regex(), "a" * 255)
    assert time.monotonic() - began < 1


@given(st.text(max_size=4), st.text(max_size=4))
@example("a\U0010ffff", "z")
@example("\ud7ff", "")
def test_the_upper_bound_is_above_what_begins_with_the_prefix(prefix: str, rest: str) -> None:
    bound = upper_bound(prefix)
    assert bound is None or prefix + rest < bound
    assert bound is None or not bound.startswith(prefix)


@pytest.mark.parametrize(
    ("prefix", "bound"),
    [
        ("ab", "ac"),
        ("a\U0010ffff", "b"),
        ("a\ud7ff", "a\ue000"),
        ("😀", "😁"),
        ("", None),
        ("\U0010ffff" * 2, None),
    ],
)
def test_the_upper_bound_is_the_least(prefix: str, bound: str | None) -> None:
    assert upper_bound(prefix) == bound


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("a\0*", "a pattern has no NUL and is valid Unicode: 'a"),
        ("\udcff*", "a pattern has no NUL and is valid Unicode: "),
        ("a" * (MAX_GLOB_LENGTH + 1), "a pattern has at most 1000 characters, not 1001"),
    ],
)
def test_what_no_database_could_be_asked_for_is_refused(pattern: str, message: str) -> None:
    with pytest.raises(ValueError, match="a pattern has") as caught:
        Glob(pattern)
    assert str(caught.value).startswith(message)
