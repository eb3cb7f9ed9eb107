"""Anything may happen in any order: no block is lost or owned twice, nobody starves, the pool ends whole."""

import contextlib
from typing import ClassVar

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from penstock.engine.config import SchedulerConfig
from penstock.engine.scheduler import AdmissionPolicy, WorstCase
from penstock.errors import ContextTooLong, DeadlineUnmeetable, InvalidRequest, Overloaded, RequestError
from penstock.protocol import Priority
from tests.engine.scheduler.fakes import Driver, picture_of, request_of

SHARED = list(range(40))


class SchedulerMachine(RuleBasedStateMachine):
    """Arrivals, aborts, steps, choices, shared prefixes and the passing of time over a pool of 24 small blocks."""

    window: ClassVar[int | None] = None
    admission: ClassVar[AdmissionPolicy | None] = None
    num_workers: ClassVar[int] = 0
    sees_both_ways: ClassVar[bool] = False
    reads_prompts_whole: ClassVar[bool] = False
    requests = Bundle("requests")

    def __init__(self) -> None:
        super().__init__()
        self.driver = Driver(
            config=SchedulerConfig(step_tokens=16, max_running=6, max_waiting=12, starvation_s=30),
            window=self.window,
            admission=self.admission,
            num_workers=self.num_workers,
            sees_both_ways=self.sees_both_ways,
            reads_prompts_whole=self.reads_prompts_whole,
        )
        self.num_made = 0

    @rule(
        target=requests,
        shared=st.integers(0, 40),
        own=st.integers(1, 12),
        max_tokens=st.integers(1, 40),
        n=st.integers(1, 3),
        tenant=st.sampled_from("ab"),
        priority=st.sampled_from(Priority),
        deadline_s=st.none() | st.floats(0.5, 50),
        width=st.none() | st.integers(1, 4),
        seen=st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 6), st.integers(1, 16)), max_size=3),
    )
    def arrive(
        self,
        shared: int,
        own: int,
        max_tokens: int,
        n: int,
        tenant: str,
        priority: Priority,
        deadline_s: float | None,
        width: int | None,
        seen: list[tuple[str, int, int]],
    ) -> str:
        self.num_made += 1
        name = f"r{self.num_made}"
        prompt, pictures = [], []
        for content, gap, num_tokens in seen:
            prompt += [3] * gap
            pictures.append(picture_of(f"{content}{num_tokens}", len(prompt), num_tokens))
            prompt += [2] * num_tokens
        prompt += SHARED[:shared] + [1000 + self.num_made] * own
        request = request_of(
            name,
            prompt=prompt,
            max_tokens=max_tokens,
            n=n,
            tenant=tenant,
            priority=priority,
            deadline_s=deadline_s,
            width=width,
            pictures=pictures,
        )
        # Refused or not, nothing may be left behind; that a refusal names a time is tested beside its cause.
        refusals: list[type[RequestError]] = [ContextTooLong] if width is not None or seen else []
        if self.reads_prompts_whole and seen:
            refusals.append(InvalidRequest)
        with contextlib.suppress(Overloaded, DeadlineUnmeetable, *refusals):
            self.driver.add(request)
        return name

    @rule(name=consumes(requests))
    def abort(self, name: str) -> None:
        if name in self.driver.requests:
            self.driver.abort(name)

    @rule(num_steps=st.integers(1, 6), drafted=st.integers(0, 9), accepted=st.integers(0, 9))
    def step(self, num_steps: int, drafted: int, accepted: int) -> None:
        for _ in range(num_steps):
            batch = self.driver.step(drafted, accepted)
            assert batch.num_tokens <= 16
            assert batch.num_tokens == sum(batch.query_lens)
            self.driver.encoded(1)
            self.driver.check()

    @rule(seconds=st.floats(0, 40))
    def time_passes(self, seconds: float) -> None:
        self.driver.now_s += seconds

    @rule()
    def refuse_late(self) -> None:
        self.driver.refuse_late()

    @rule(tokens=st.integers(1, 100))
    def speed_is_measured(self, tokens: int) -> None:
        self.driver.scheduler.prefill_rate.observe(tokens, 1.0)

    @invariant()
    def nothing_is_lost(self) -> None:
        self.driver.check()

    def teardown(self) -> None:
        self.driver.refuse_late()
        work = sum(
            len(request.sequences) * (len(request.sequences[0].token_ids) + request.sampling.max_tokens)
            for request in self.driver.requests.values()
        )
        # Each token may be recomputed a few times; what is starved would never end.
        self.driver.run_to_end(200 + 4 * work)


class WindowMachine(SchedulerMachine):
    """The same for a model whose every layer sees nine tokens."""

    window = 9


class ElsewhereMachine(SchedulerMachine):
    """The same where encoders in other processes take their time."""

    num_workers = 2


class BothWaysMachine(SchedulerMachine):
    """The same for a model that reads each picture whole."""

    sees_both_ways = True


class WholePromptsMachine(BothWaysMachine):
    """The same for a model that reads a prompt with a picture whole."""

    reads_prompts_whole = True


class WorstCaseMachine(SchedulerMachine):
    """The same with the policy that sets aside all a sequence may need: choices aside, nothing is preempted."""

    admission = WorstCase()


for machine in (
    SchedulerMachine,
    WindowMachine,
    ElsewhereMachine,
    BothWaysMachine,
    WholePromptsMachine,
    WorstCaseMachine,
):
    machine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)

TestScheduler = SchedulerMachine.TestCase
TestWindow = WindowMachine.TestCase
TestElsewhere = ElsewhereMachine.TestCase
TestBothWays = BothWaysMachine.TestCase
TestWholePrompts = WholePromptsMachine.TestCase
TestWorstCase = WorstCaseMachine.TestCase
