"""Stop strings: the one that is complete first wins, and no part of one is ever shown."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen2_jax.text import StopChecker


def run(checker: StopChecker, pieces: list[str]) -> list[str]:
    """Feed pieces until a match; return what was shown after each, and at the end."""
    shown = []
    for piece in pieces:
        shown.append(checker.feed(piece))
        if checker.matched is not None:
            return shown
    return [*shown, checker.finish()]


def expected(pieces: list[str], stop: list[str], *, include: bool, min_tokens: int) -> tuple[str, str | None]:
    """Return the final text and the stop string, found by looking at every prefix of the text."""
    text = "".join(pieces)
    first = len("".join(pieces[:min_tokens])) + 1
    for end in range(first, len(text) + 1):
        matches = [pattern for pattern in stop if text[:end].endswith(pattern)]
        if matches:
            longest = max(matches, key=len)
            return text[: end if include else end - len(longest)], longest
    return text, None


@settings(max_examples=200)
@given(
    pieces=st.lists(st.text("ab", max_size=4), max_size=10),
    stop=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3, unique=True),
    include=st.booleans(),
    min_tokens=st.integers(0, 4),
)
def test_any_text_in_any_pieces(pieces: list[str], stop: list[str], include: bool, min_tokens: int) -> None:
    checker = StopChecker(stop, include_stop_str_in_output=include, min_tokens=min_tokens)
    shown = run(checker, pieces)
    text, matched = expected(pieces, stop, include=include, min_tokens=min_tokens)
    assert "".join(shown) == text
    assert checker.matched == matched
    for i in range(len(shown)):
        # Whatever was shown so far is still right at the end.
        assert text.startswith("".join(shown[:i]))


def test_a_stop_string_over_three_tokens_is_never_shown() -> None:
    checker = StopChecker(["<end>"])
    assert run(checker, ["Hi <", "en", "d> more"]) == ["Hi ", "", ""]
    assert checker.matched == "<end>"


def test_a_false_start_is_shown_once_it_is_one() -> None:
    checker = StopChecker(["aab"])
    assert run(checker, ["xaa", "a", "c"]) == ["x", "a", "aac", ""]
    assert checker.matched is None


def test_the_first_complete_match_wins_however_the_text_is_split() -> None:
    for pieces in (["abcd"], ["abc", "d"], list("abcd")):
        checker = StopChecker(["abcd", "bc"])
        assert "".join(run(checker, pieces)) == "a"
        assert checker.matched == "bc"


def test_of_matches_with_the_same_end_the_longest_wins() -> None:
    checker = StopChecker(["\n", "\n\n", "User:"])
    assert "".join(run(checker, ["Hi\n"])) == "Hi"
    checker = StopChecker(["d", "cd"])
    assert "".join(run(checker, ["abcd"])) == "ab"
    assert checker.matched == "cd"


def test_included_stop_strings_end_the_text_and_nothing_is_held_back() -> None:
    checker = StopChecker(["END"], include_stop_str_in_output=True)
    assert run(checker, ["go E", "ND of it"]) == ["go E", "ND"]


def test_held_back_text_comes_out_at_the_end() -> None:
    checker = StopChecker(["END"])
    assert run(checker, ["the EN"]) == ["the ", "EN"]


@pytest.mark.parametrize(("min_tokens", "text"), [(0, ""), (1, "."), (2, ".."), (5, ".....")])
def test_min_tokens_lets_early_stop_strings_pass(min_tokens: int, text: str) -> None:
    checker = StopChecker(["."], min_tokens=min_tokens)
    assert "".join(run(checker, ["."] * 5)) == text


def test_without_stop_strings_all_text_passes() -> None:
    checker = StopChecker([])
    assert run(checker, ["a", "", "b"]) == ["a", "", "b", ""]
