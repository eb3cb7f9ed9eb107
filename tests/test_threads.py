"""A thread for work that may take too long."""

import threading

import pytest

from penstock.threads import WorkThread


def test_calls_run_in_order_and_give_their_results() -> None:
    thread = WorkThread("work")
    seen: list[int] = []

    def work(number: int) -> str:
        seen.append(number)
        return threading.current_thread().name

    futures = [thread.submit(work, number) for number in range(5)]
    assert [future.result() for future in futures] == ["work"] * 5
    assert seen == [0, 1, 2, 3, 4]
    with pytest.raises(ZeroDivisionError):
        thread.submit(lambda: 1 // 0).result()


def test_a_call_that_has_not_begun_can_be_cancelled_and_a_dropped_thread_ends_with_its_work() -> None:
    thread = WorkThread("dropped")
    release = threading.Event()
    first, second, third = thread.submit(release.wait), thread.submit(int), thread.submit(str)
    (worker,) = [one for one in threading.enumerate() if one.name == "dropped"]
    assert second.cancel()
    del thread
    release.set()
    assert first.result()
    assert third.result() == ""
    assert not first.cancel()
    worker.join()


def test_the_stack_is_as_deep_as_asked_and_others_stay_as_they_are() -> None:
    before = threading.stack_size()
    WorkThread("deep", stack_bytes=64 * 1024 * 1024).submit(int).result()
    assert threading.stack_size() == before
