"""Checking grammars when one takes too long: it is given up, others go on, and not for ever."""

import asyncio
import threading

import msgspec
import pytest

from penstock.errors import InvalidRequest, Overloaded
from penstock.server import ServerConfig
from penstock.server.structure import GrammarChecker, Structure
from penstock.text.grammar import regex_grammar
from tests.server.fakes import MODEL, TOKENIZER

FINE = Structure(param="fine", write=lambda: regex_grammar("a+"))


class Slow:
    """A grammar that is not written before ``release``."""

    def __init__(self) -> None:
        self.begun, self.release = threading.Event(), threading.Event()

    def structure(self, *, is_required: bool = True) -> Structure:
        def write() -> str:
            self.begun.set()
            self.release.wait()
            return regex_grammar("slow")

        return Structure(param="slow", write=write, is_required=is_required)


async def checker(timeout_s: float = 0.2) -> GrammarChecker:
    """Return one that has its vocabulary indexed, and little patience."""
    model = msgspec.structs.replace(MODEL, eos_token_ids=(0,))
    checker = GrammarChecker(TOKENIZER, lambda: model, ServerConfig(grammar_timeout_s=timeout_s))
    assert await checker.check(FINE) == FINE.write()
    return checker


async def test_a_slow_grammar_is_given_up_and_the_next_one_is_checked_on_another_thread() -> None:
    checking, slow = await checker(), Slow()
    try:
        with pytest.raises(InvalidRequest, match=r"slow takes longer than 0\.2 s"):
            await checking.check(slow.structure())
        assert await checking.check(FINE) == FINE.write()
        assert await checking.check(Slow.structure(slow, is_required=False)) is None
        assert await checking.check(FINE) == FINE.write()
    finally:
        slow.release.set()


async def test_who_only_waited_for_others_is_told_to_retry() -> None:
    checking, slow = await checker(1.0), Slow()
    try:
        first = asyncio.create_task(checking.check(slow.structure()))
        await asyncio.to_thread(slow.begun.wait)
        with pytest.raises(Overloaded, match="other requests") as caught:
            await checking.check(FINE)
        assert caught.value.retry_after_s == 1
        with pytest.raises(InvalidRequest):
            await first
    finally:
        slow.release.set()


async def test_no_more_than_a_few_are_left_to_themselves() -> None:
    checking, slow = await checker(), Slow()
    try:
        for _ in range(3):
            with pytest.raises(InvalidRequest):
                await checking.check(slow.structure())
        with pytest.raises(Overloaded):
            await checking.check(FINE)
    finally:
        slow.release.set()
    while True:
        try:
            assert await checking.check(FINE) == FINE.write()
            break
        except Overloaded:
            continue
