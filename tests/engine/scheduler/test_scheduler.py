"""Who goes first, who must wait, who gives way, and who is refused."""

import math

import pytest

from penstock.engine.config import SchedulerConfig
from penstock.engine.scheduler import WorstCase
from penstock.errors import ContextTooLong, DeadlineUnmeetable, Overloaded
from penstock.protocol import Priority
from tests.engine.scheduler.fakes import Driver, request_of


def test_a_small_tenant_gets_its_half_beside_one_that_sends_fifty_times_as_much() -> None:
    driver = Driver(num_blocks=200, config=SchedulerConfig(step_tokens=32, max_running=8))
    for i in range(500):
        driver.add(request_of(f"big-{i}", tenant="big", max_tokens=16))
    # They run for a while before the small one comes, which must earn neither of them anything.
    for _ in range(50):
        driver.step()
    driver.served.clear()
    for i in range(10):
        driver.add(request_of(f"small-{i}", tenant="small", max_tokens=16))
    num_sent = 10
    for _ in range(600):
        driver.step()
        while sum(name.startswith("small") for name in driver.requests) < 10:
            driver.add(request_of(f"small-{num_sent}", tenant="small", max_tokens=16))
            num_sent += 1
        if not any(name.startswith("big") for name in driver.requests):
            break
    share = driver.served["small"] / sum(driver.served.values())
    assert 0.45 < share < 0.55


def test_prompts_are_cut_into_chunks_that_share_steps_with_decodes() -> None:
    driver = Driver(num_blocks=100)
    driver.add(request_of("decoding", prompt=4, max_tokens=20))
    driver.step()
    driver.add(request_of("long", prompt=40, max_tokens=1))
    batches = [driver.step() for _ in range(7)]
    assert [sorted(batch.query_lens) for batch in batches] == [*[[1, 6]] * 6, [1, 4]]


def test_prompts_take_three_eighths_of_a_step_together_unless_more_wait_than_decode() -> None:
    driver = Driver(num_blocks=100)
    for name in ("first", "second"):
        driver.add(request_of(name, prompt=20, max_tokens=20))
    assert driver.step().query_lens == [16]
    assert driver.step().query_lens == [4, 12]
    assert driver.step().query_lens == [1, 6]
    driver.step()
    driver.add(request_of("third", prompt=20, max_tokens=20))
    assert driver.step().query_lens == [1, 1, 6]
    for i in range(3):
        driver.add(request_of(f"another {i}", prompt=20, max_tokens=20))
    assert driver.step().query_lens == [1, 1, 14], "four wait for a first token, and two for their next"
    assert driver.step().query_lens == [1, 1, 1, 6], "three for each"


def test_urgent_classes_and_early_deadlines_go_first() -> None:
    driver = Driver(num_blocks=100, config=SchedulerConfig(step_tokens=16, max_running=1))
    order: list[str] = []
    driver.add(request_of("running", max_tokens=3))
    driver.step()
    driver.add(request_of("best effort", max_tokens=1))
    driver.add(request_of("late", max_tokens=1, priority=Priority.P2, deadline_s=900))
    driver.add(request_of("early", max_tokens=1, priority=Priority.P2, deadline_s=800))
    driver.add(request_of("urgent", max_tokens=1, priority=Priority.P0, deadline_s=999))
    while driver.requests:
        before = set(driver.requests)
        driver.step()
        order.extend(before - set(driver.requests))
    assert order == ["running", "urgent", "early", "late", "best effort"]


def test_an_urgent_arrival_does_not_wait_for_a_long_prompt_that_runs() -> None:
    driver = Driver(num_blocks=100, config=SchedulerConfig(step_tokens=16, max_running=6))
    long = driver.add(request_of("long", prompt=160, max_tokens=1))
    driver.step()
    driver.add(request_of("equal", prompt=8, max_tokens=1))
    urgent = driver.add(request_of("urgent", prompt=8, max_tokens=1, priority=Priority.P1, deadline_s=math.inf))
    batch = driver.step()
    assert batch.query_lens == [8, 8], "the urgent prompt, and the long one with what is left"
    assert urgent.sequences[0].num_output_tokens == 1
    assert long.sequences[0].num_computed_tokens == 16 + 8
    assert "equal" in driver.requests, "its own class it does not overtake"
    driver.run_to_end(50)


def test_who_waited_too_long_goes_first_whatever_its_class() -> None:
    driver = Driver(num_blocks=100, config=SchedulerConfig(step_tokens=16, max_running=1, starvation_s=20))
    driver.add(request_of("patient", max_tokens=1))
    steps = 0
    while "patient" in driver.requests:
        driver.add(request_of(f"urgent-{steps}", max_tokens=1, priority=Priority.P1, deadline_s=math.inf))
        driver.step()
        steps += 1
    assert 20 <= steps <= 23


def test_a_full_queue_refuses_with_a_time_to_retry() -> None:
    driver = Driver(config=SchedulerConfig(max_waiting=2, max_waiting_tokens=20))
    driver.add(request_of("a", prompt=8))
    with pytest.raises(Overloaded, match="at most 20") as by_tokens:
        driver.add(request_of("b", prompt=13))
    driver.add(request_of("c", prompt=4))
    with pytest.raises(Overloaded, match="2 requests are queued") as by_count:
        driver.add(request_of("d", prompt=1))
    assert by_tokens.value.retry_after_s
    assert by_count.value.retry_after_s
    driver.run_to_end(50)


def test_a_deadline_that_cannot_be_met_is_refused_on_arrival_and_while_waiting() -> None:
    driver = Driver(num_blocks=200, config=SchedulerConfig(step_tokens=16, max_running=1))
    driver.scheduler.prefill_rate.observe(10, 1.0)
    driver.add(request_of("ahead", prompt=40, max_tokens=60))
    with pytest.raises(DeadlineUnmeetable, match="retry later") as refused:
        driver.add(request_of("hasty", prompt=50, deadline_s=4))
    assert refused.value.retry_after_s is not None
    assert refused.value.retry_after_s >= 1
    driver.step()
    driver.step()
    driver.step()
    driver.add(request_of("hopeful", prompt=10, deadline_s=8))
    assert driver.refuse_late() == []
    driver.now_s += 8
    assert driver.refuse_late() == ["hopeful"]
    driver.run_to_end(100)


def test_what_could_never_fit_is_refused_at_once() -> None:
    driver = Driver()
    with pytest.raises(ContextTooLong, match="27 cache blocks; there are 24"):
        driver.add(request_of("huge", prompt=100, max_tokens=8))
    with pytest.raises(ContextTooLong, match="at most 6"):
        driver.add(request_of("many", n=7))
    assert not driver.scheduler.has_work


def test_the_cheapest_of_the_least_urgent_class_gives_way() -> None:
    driver = Driver(num_blocks=24, config=SchedulerConfig(step_tokens=64, max_running=6))
    # Once short answers have been seen, growth is expected to be small and everybody is let in.
    driver.add(request_of("lesson", prompt=4, max_tokens=1))
    driver.run_to_end(5)
    urgent = driver.add(request_of("urgent", prompt=8, max_tokens=40, priority=Priority.P1, deadline_s=math.inf))
    dear = driver.add(request_of("dear", prompt=36, max_tokens=40))
    cheap = driver.add(request_of("cheap", prompt=24, max_tokens=40))
    while not driver.scheduler.counters.num_preemptions:
        driver.step()
        driver.check()
    assert [len(request.sequences[0].preemptions) for request in (urgent, dear, cheap)] == [0, 0, 1]
    driver.run_to_end(300)
    assert urgent.sequences[0].preemptions == []


def test_setting_aside_the_worst_case_never_preempts() -> None:
    driver = Driver(admission=WorstCase())
    for i in range(30):
        driver.add(request_of(f"r{i}", prompt=5 + i % 20, max_tokens=1 + (7 * i) % 40))
    driver.run_to_end(2000)
    assert driver.scheduler.counters.num_preemptions == 0


def test_waits_are_told_apart() -> None:
    driver = Driver(num_blocks=100, config=SchedulerConfig(step_tokens=16, max_running=1))
    driver.add(request_of("first", max_tokens=5))
    driver.step()
    waiting = driver.add(request_of("second", max_tokens=1))
    driver.run_to_end(20)
    timeline = waiting.sequences[0].timeline(finished_at_s=driver.now_s)
    assert timeline.admitted_s == pytest.approx(sum(timeline.waited_s.values()))
    assert timeline.waited_s["max_running"] > 2
