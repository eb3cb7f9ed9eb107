import itertools
import time

from hypothesis import given
from hypothesis import strategies as st

from penstock.text import StopMatcher

texts = st.text(alphabet="abc", max_size=40)
stops = st.lists(st.text(alphabet="abc", min_size=1, max_size=5), min_size=1, max_size=4).map(tuple)


def search(text: str, stop: tuple[str, ...]) -> tuple[int, str] | None:
    """Where the first match ends in the whole text, and which it is: the plain statement of the rule."""
    for end in range(len(text) + 1):
        ending = [string for string in stop if text[:end].endswith(string)]
        if ending:
            return end, max(ending, key=len)
    return None


def feed(matcher: StopMatcher, pieces: list[str]) -> tuple[list[str], str | None]:
    emitted = []
    for piece in pieces:
        text, matched = matcher.push(piece)
        emitted.append(text)
        if matched is not None:
            return emitted, matched
    return [*emitted, matcher.flush()], None


def cut(text: str, borders: list[int]) -> list[str]:
    places = sorted({0, len(text), *(border % (len(text) + 1) for border in borders)})
    return [text[start:end] for start, end in itertools.pairwise(places)]


@given(texts, stops, st.booleans(), st.lists(st.integers(0, 1000), max_size=10))
def test_agrees_with_a_search_of_the_whole_text_however_it_is_cut(
    text: str, stop: tuple[str, ...], include: bool, borders: list[int]
) -> None:
    emitted, matched = feed(StopMatcher(stop, include), cut(text, borders))
    found = search(text, stop)
    if found is None:
        assert ("".join(emitted), matched) == (text, None)
    else:
        end, string = found
        assert ("".join(emitted), matched) == (text[: end if include else end - len(string)], string)


@given(texts, stops)
def test_holds_back_exactly_what_may_still_become_a_stop_string(text: str, stop: tuple[str, ...]) -> None:
    matcher = StopMatcher(stop, False)
    seen = emitted = ""
    for character in text:
        certain, matched = matcher.push(character)
        if matched is not None:
            return
        seen, emitted = seen + character, emitted + certain
        may_become = [
            length for string in stop for length in range(len(string)) if seen.endswith(string[:length]) and length
        ]
        assert len(seen) - len(emitted) == max(may_become, default=0)


def test_of_two_that_end_together_the_longer_counts() -> None:
    assert StopMatcher(("b", "ab"), False).push("xab") == ("x", "ab")


def test_the_one_that_ends_first_counts_even_if_another_began_earlier() -> None:
    assert StopMatcher(("abcd", "bc"), False).push("abcd") == ("a", "bc")


def test_includes_the_stop_string_on_request() -> None:
    matcher = StopMatcher(("\n\n",), True)
    assert matcher.push("one\n") == ("one", None)
    assert matcher.push("\ntwo") == ("\n\n", "\n\n")


def test_what_may_not_match_is_text_like_any_other() -> None:
    matcher = StopMatcher(("ab",), False)
    early, matched = matcher.push("1 ab 2 a", may_match=False)
    assert (early, matched) == ("1 ab 2 ", None)
    assert matcher.push("b") == ("", "ab"), "this one ends where it may"


def test_no_stop_strings_hold_nothing_back() -> None:
    matcher = StopMatcher((), False)
    assert matcher.push("text") == ("text", None)
    assert matcher.flush() == ""


def test_cost_is_linear_where_every_character_is_a_near_miss() -> None:
    stop = ("a" * 500 + "b",)

    def seconds(num_chars: int) -> float:
        matcher = StopMatcher(stop, False)
        start = time.process_time()
        for _ in range(num_chars // 5):
            matcher.push("aaaaa")
        return time.process_time() - start

    seconds(1000)
    assert min(seconds(40_000) for _ in range(3)) < 40 * min(seconds(4_000) for _ in range(3))
