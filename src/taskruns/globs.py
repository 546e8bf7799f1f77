"""Shell patterns by which tasks are chosen, also as what each database calls a pattern."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache

MAX_GLOB_LENGTH = 1000
"""Characters in a pattern; the databases limit what they take."""

_TOKEN = re.compile(r"(?P<many>\*+)|(?P<one>\?)|\[(?P<set>!?+\]?+[^]]*+)\]|(?P<character>.)", re.DOTALL)
_ITEM = re.compile(r".-.|.", re.DOTALL)
_PUNCTUATION = re.compile(r"[ -/:-@\[-^`{-~]")


@dataclass(frozen=True, slots=True)
class _Set:
    """One character among some, or outside them; each item is a character or a range such as ``a-z``."""

    items: tuple[str, ...]
    is_negated: bool


_ANY = _Set((), is_negated=True)
_NONE = _Set((), is_negated=False)
_Token = str | _Set | None  # a character, one of some, any number of any


@dataclass(frozen=True, slots=True)
class Glob:
    """A shell pattern: ``*`` is any characters, ``?`` one, ``[abc]``, ``[a-z]`` and ``[!a-z]`` one of a set or outside.

    It is that of :func:`fnmatch.fnmatchcase`: the whole text has to match, case matters, nothing escapes except a set
    such as ``[*]``, and a ``[`` that nothing ends stands for itself.

    Raises:
        ValueError: the text is too long, or a database could not be asked for it.
    """

    text: str

    def __post_init__(self) -> None:
        if len(self.text) > MAX_GLOB_LENGTH:
            raise ValueError(f"a pattern has at most {MAX_GLOB_LENGTH} characters, not {len(self.text)}")
        if re.search("[\0\ud800-\udfff]", self.text):
            raise ValueError(f"a pattern has no NUL and is valid Unicode: {self.text!r}")

    def matches(self, text: str) -> bool:
        """Whether the whole of a text is of this pattern."""
        return fnmatchcase(text, self.text)

    @property
    def prefix(self) -> str:
        """What every text that matches begins with: the characters before the first wildcard."""
        tokens = _parsed(self.text)
        end = next((index for index, token in enumerate(tokens) if not isinstance(token, str)), len(tokens))
        return "".join(map(str, tokens[:end]))

    @property
    def literal(self) -> str | None:
        """The only text that matches; None if there is a true wildcard. ``a[*]`` has none, it is ``a*``."""
        return self.prefix if all(isinstance(token, str) for token in _parsed(self.text)) else None

    def sqlite(self) -> str:
        """Return the same for the operator GLOB of SQLite."""
        return "".join(map(_sqlite, _parsed(self.text)))

    def regex(self) -> str:
        """Return the same as a regular expression: for PostgreSQL's ``~``, and REGEXP of MariaDB and of MySQL.

        It holds for a column that compares code points, such as one of collation C or utf8mb4_bin. No text makes it
        slow: whoever backtracks finds only one place for whatever stands between two stars, the first.
        """
        tokens = _parsed(self.text)
        if _NONE in tokens:
            return "(?s)^(?!.)."
        first, *rest = _segments(tokens)
        if not rest:
            return f"(?s)^{first}(?!.)"  # a dollar also matches before a line break at the end
        *inner, last = rest
        end = last and "(?!.)"
        last = last or (inner.pop() if inner else "")
        return f"(?s)^{first}" + "".join(f"(?:(?!{part}).)*{part}" for part in inner) + f".*{last}{end}"


def is_glob(text: str) -> bool:
    """Whether a text has any of the characters that make a pattern more than a name."""
    return any(mark in text for mark in "*?[")


def upper_bound(prefix: str) -> str | None:
    """Return the least text above all that begin with a prefix, by code points; None if there is none."""
    kept = prefix.rstrip("\U0010ffff")
    if not kept:
        return None
    last = ord(kept[-1])
    return kept[:-1] + ("\ue000" if last == 0xD7FF else chr(last + 1))  # noqa: PLR2004  (surrogates are in between)


@lru_cache(maxsize=256)
def _parsed(text: str) -> tuple[_Token, ...]:
    return tuple(_tokens(text))


def _tokens(text: str) -> Iterator[_Token]:
    for match in _TOKEN.finditer(text):
        match match.lastgroup:
            case "many":
                yield None
            case "one":
                yield _ANY
            case "set":
                yield _set(match["set"])
            case _:
                yield match[0]


def _set(text: str) -> str | _Set:
    """Return what stands between brackets; a single character is that."""
    is_negated = text.startswith("!")
    items = [item for item in _ITEM.findall(text[is_negated:]) if item[0] <= item[-1]]
    if not is_negated and items and items[0].startswith("!"):
        # Behind ranges that run backwards. fnmatch drops these, and only then looks for what negates.
        is_negated, items[:1] = True, list(items[0][1:])
    characters = {character for item in items for character in (item[0], item[-1])}
    return characters.pop() if len(characters) == 1 and not is_negated else _Set(tuple(items), is_negated)


def _sqlite(token: _Token) -> str:
    """Return a token for GLOB, which knows no escape: where a character stands in a set decides what it means.

    A ``]`` is itself only as the first, and no range may begin or end with it. A ``^`` is itself anywhere but there,
    so that a set without a bracket begins with an impossible range; of characters that no task id has, since GLOB
    takes the first of them for one of the set. A hyphen is itself behind a range, so that every item is one.
    """
    match token:
        case None:
            return "*"
        case str():
            return f"[{token}]" if is_glob(token) else token
        case _Set():
            ranges = [part for item in token.items for part in _without_bracket(item[0], item[-1])]
            has_bracket = any(item[0] <= "]" <= item[-1] for item in token.items)
            return "".join(["[", "^" * token.is_negated, "]" if has_bracket else "\x02-\x01", *ranges, "]"])


def _without_bracket(first: str, last: str) -> Iterator[str]:
    parts = [(first, min(last, "\\")), (max(first, "^"), last)] if first <= "]" <= last else [(first, last)]
    return (f"{first}-{last}" for first, last in parts if first <= last)


def _segments(tokens: tuple[_Token, ...]) -> list[str]:
    """Return the regular expressions of what stands between the stars, before them and after them."""
    segments = [""]
    for token in tokens:
        if token is None:
            segments.append("")
        else:
            segments[-1] += _regex(token)
    return segments


def _regex(token: str | _Set) -> str:
    if isinstance(token, str):
        return _escaped(token)
    if token == _ANY:
        return "."
    items = "".join("-".join(map(_escaped, item[::2])) for item in token.items)
    return f"[{'^' * token.is_negated}{items}]"


def _escaped(character: str) -> str:
    """Return a character as itself. All punctuation is escaped: ``[:`` and ``&&`` mean something to some."""
    return _PUNCTUATION.sub(r"\\\g<0>", character)
