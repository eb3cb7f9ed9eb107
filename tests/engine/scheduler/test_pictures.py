"""Which pictures a step encodes, and who waits for them. Each of the driver's steps checks every row that is shown."""

from itertools import pairwise

import msgspec
import pytest

from penstock.engine.config import SchedulerConfig
from penstock.engine.scheduler import ScheduledBatch
from penstock.errors import InvalidRequest, Overloaded
from penstock.protocol import GenerateRequest
from tests.engine.scheduler.fakes import Driver, picture_of, request_of


def asking(name: str, *seen: tuple[str, int], text: int = 3, max_tokens: int = 1) -> GenerateRequest:
    """Return a request of a token, pictures (content, tokens) one after another, and a question of its own."""
    prompt, pictures = [3], []
    for key, num_tokens in seen:
        pictures.append(picture_of(key, len(prompt), num_tokens))
        prompt += [2] * num_tokens
    question = request_of(name, prompt=text).prompt_token_ids
    return request_of(name, prompt=prompt + question, max_tokens=max_tokens, pictures=pictures)


def driver_of(**settings: object) -> Driver:
    defaults = {"num_blocks": 100, "config": SchedulerConfig(step_tokens=32, max_running=6)}
    return Driver(**{**defaults, **settings})  # type: ignore[arg-type]


def encoded(batch: ScheduledBatch) -> list[str]:
    return [picture.key.decode() for _, picture in batch.encode]


def test_pictures_of_several_requests_are_encoded_together_within_the_budget() -> None:
    driver = driver_of(encoder_tokens=10)
    for name in "abc":
        driver.add(asking(name, (name, 4)))
    first = driver.step()
    assert encoded(first) == ["a", "b"], "a third would make twelve tokens"
    assert first.query_lens == [8, 8, 1], "the third goes as far as its picture"
    second = driver.step()
    assert encoded(second) == ["c"]
    driver.run_to_end(5)


def test_a_picture_above_the_budget_is_encoded_beside_small_ones_and_those_who_decode() -> None:
    driver = driver_of(encoder_tokens=10)
    driver.add(request_of("decoding", prompt=4, max_tokens=20))
    driver.step()
    for name, size in (("small", 4), ("large", 25), ("later", 4)):
        driver.add(asking(name, (name, size)))
    batches = [driver.step() for _ in range(10)]
    assert [encoded(batch) for batch in batches] == [["small", "large", "later"], *[[]] * 9]
    assert all(batch.query_lens[0] == 1 for batch in batches), "nobody's next token waits for a second step"
    assert "large" not in driver.requests


def test_small_pictures_and_large_ones_wait_for_each_other_no_longer_than_twice_their_own_time() -> None:
    driver = driver_of(encoder_tokens=10, feature_tokens=1000, config=SchedulerConfig(step_tokens=200, max_running=200))
    driver.add(asking("large", ("large", 100)))
    finished_in: dict[str, int] = {}
    num_steps = 0
    while "large" in driver.requests:
        name = f"small {num_steps}"
        driver.add(asking(name, (name, 9 if num_steps % 3 == 0 else 2)))
        driver.step()
        num_steps += 1
        finished_in |= {one: num_steps for one in [name] if one not in driver.requests}
    assert num_steps <= 2 * 10 + 2
    assert len(finished_in) > num_steps / 2


def test_pictures_that_cost_little_leave_room_for_one_that_costs_a_whole_step() -> None:
    driver = driver_of(encoder_tokens=10, feature_tokens=1000, config=SchedulerConfig(step_tokens=200, max_running=200))
    driver.add(asking("large", ("large", 100)))
    driver.add(asking("whole", ("whole", 10)))
    for i in range(4):
        driver.add(asking(f"little {i}", (f"little {i}", 4)))
        driver.step()
    assert "whole" not in driver.requests
    assert "large" in driver.requests


def test_a_picture_is_begun_beside_a_much_larger_one_alone() -> None:
    driver = driver_of(encoder_tokens=10, feature_tokens=1000, config=SchedulerConfig(step_tokens=200, max_running=200))
    for name, size in (("first", 80), ("as large", 80), ("small beside it", 12), ("no more room", 12)):
        driver.add(asking(name, (name, size)))
    assert encoded(driver.step()) == ["first", "small beside it"]
    driver.run_to_end(60)


def test_a_picture_in_two_prompts_is_encoded_once() -> None:
    driver = driver_of(encoder_tokens=10)
    driver.add(asking("first", ("same", 8)))
    driver.add(asking("second", ("same", 8)))
    assert encoded(driver.step()) == ["same"]
    counters = driver.features.counters
    assert (counters.num_queries, counters.num_hits) == (2, 1)
    driver.run_to_end(5)


def test_salts_share_no_features() -> None:
    driver = driver_of(encoder_tokens=20)
    for i, salt in enumerate(("", "blue", "blue")):
        driver.add(msgspec.structs.replace(asking(f"r{i}", ("same", 8)), cache_salt=salt))
    assert encoded(driver.step()) == ["same", "same"]


def test_a_second_question_computes_only_itself_and_needs_no_features() -> None:
    driver = driver_of(encoder_tokens=20)
    driver.add(asking("first", ("same", 15), text=3))
    driver.run_to_end(5)
    driver.add(asking("second", ("same", 15), text=5))
    batch = driver.step()
    assert (encoded(batch), batch.query_lens, batch.pictures) == ([], [5], [])
    driver.add(asking("other", ("different", 15), text=5))
    batch = driver.step()
    assert (encoded(batch), batch.query_lens) == (["different"], [21])


def test_equal_pictures_elsewhere_share_nothing() -> None:
    driver = driver_of(encoder_tokens=40)
    driver.add(asking("first", ("a", 7), ("b", 8)))
    driver.run_to_end(5)
    # The same tokens: other pictures, another order, other borders between them.
    for name, seen in (("swapped", (("b", 7), ("a", 8))), ("moved", (("a", 8), ("b", 7)))):
        driver.add(asking(name, *seen))
        assert driver.step().query_lens == [19]


def test_a_placeholder_that_shows_nothing_is_not_taken_for_one_that_does() -> None:
    driver = driver_of(encoder_tokens=40)
    for offset in (1, 2):
        prompt = [3, *[2] * 16, *range(10, 13)]
        driver.add(request_of(str(offset), prompt=prompt, max_tokens=1, pictures=[picture_of("a", offset, 15)]))
        assert driver.step().query_lens == [20]


def test_features_are_kept_for_who_needs_them_and_otherwise_the_latest() -> None:
    driver = driver_of(encoder_tokens=40, feature_tokens=20)
    for key in ("a", "b", "a"):
        driver.add(asking(f"{key} first", (key, 8), text=2))
        driver.run_to_end(5)
    driver.cache.pool.clear_cache()
    assert {name[1] for name in driver.features._by_name} == {b"a", b"b"}
    # Both are held, so the third waits until a prompt is done with one.
    driver.scheduler._config = SchedulerConfig(step_tokens=8, max_running=6)
    for key in ("b", "a", "c"):
        driver.add(asking(f"{key} again", (key, 8), text=2))
    driver.run_to_end(20)
    assert driver.features.counters.num_evicted == 1
    assert {name[1] for name in driver.features._by_name} == {b"a", b"c"}


def test_a_preempted_prompt_takes_its_features_again() -> None:
    driver = Driver(config=SchedulerConfig(step_tokens=8, max_running=6))
    seeing = driver.add(asking("seeing", ("a", 20))).sequences[0]
    driver.step()
    assert len(seeing.pictures.held) == 1
    driver.scheduler._preempt(seeing, driver.now_s)
    driver.check()
    driver.run_to_end(20)
    counters = driver.features.counters
    assert (counters.num_queries, counters.num_hits) == (2, 1)


def test_text_goes_on_while_others_encode() -> None:
    driver = driver_of(num_workers=1, encoder_tokens=10)
    driver.add(asking("seeing", ("a", 8), ("b", 8), ("c", 8)))
    first = driver.step()
    assert encoded(first) == ["a", "b"], "two steps' budgets may be under way"
    assert first.query_lens == [1]
    assert driver.step().sequence_ids == []
    driver.add(request_of("text", max_tokens=3))
    assert driver.step().query_lens == [8]
    driver.encoded(1)
    assert driver.step().query_lens == [1, 8]
    driver.run_to_end(20)


def test_each_encoder_elsewhere_has_one_large_picture_at_most_and_small_ones_beside() -> None:
    config = SchedulerConfig(step_tokens=200, max_running=6)
    driver = driver_of(num_workers=2, encoder_tokens=10, feature_tokens=1000, config=config)
    for name in ("large 1", "large 2", "large 3", "small"):
        driver.add(asking(name, (name, 4 if name == "small" else 30)))
    assert encoded(driver.step()) == ["large 1", "large 2", "small"]
    driver.encoded(1)
    assert encoded(driver.step()) == ["large 3"]
    driver.run_to_end(60)


def test_a_picture_that_is_read_whole_goes_first_every_other_step() -> None:
    config = SchedulerConfig(step_tokens=16, max_running=8)
    driver = Driver(num_blocks=200, config=config, sees_both_ways=True, encoder_tokens=40, feature_tokens=99)
    for i in range(4):
        driver.add(request_of(f"decoding {i}", prompt=2, max_tokens=40))
    driver.step()
    for name in "abc":
        driver.add(asking(name, (name, 16)))
    sizes = [sorted(driver.step().query_lens) for _ in range(6)]
    assert [16] in sizes, "decoding sequences leave too little, and wait for one step"
    for before, after in pairwise(sizes):
        assert before.count(1) >= 4 or after.count(1) >= 4
    driver.run_to_end(200)


@pytest.mark.parametrize(
    ("settings", "remedy"),
    [({"feature_tokens": 30}, "--encoder-cache-memory"), ({"sees_both_ways": True}, "--step-tokens")],
)
def test_what_could_never_be_computed_is_refused(settings: dict[str, object], remedy: str) -> None:
    driver = driver_of(**settings)
    with pytest.raises(InvalidRequest, match=remedy):
        driver.add(asking("huge", ("a", 33)))
    assert not driver.scheduler.has_work


def test_more_images_than_are_kept_are_refused() -> None:
    driver = driver_of(config=SchedulerConfig(step_tokens=32, max_running=6, max_image_bytes=11))

    def add(name: str, num_bytes: int) -> None:
        request = asking(name, (name, 4), max_tokens=2)
        picture = msgspec.structs.replace(request.pictures[0], pixels=b"p" * num_bytes)
        driver.add(msgspec.structs.replace(request, pictures=(picture,)))

    with pytest.raises(InvalidRequest, match="images of 12 B"):
        add("huge", 12)
    add("first", 11)
    with pytest.raises(Overloaded, match="images of 11 B"):
        add("second", 1)
    driver.add(asking("text"))
    driver.step()
    assert driver.requests
    with pytest.raises(Overloaded):
        add("second", 1)  # one that runs may be preempted, and then needs them again
    driver.abort("first")
    add("second", 11)
    driver.run_to_end(20)
    assert not driver.scheduler._intake._num_picture_bytes


def test_a_model_that_sees_nothing_says_so() -> None:
    driver = driver_of(feature_tokens=0)
    with pytest.raises(InvalidRequest, match="sees no images"):
        driver.add(asking("blind", ("a", 2)))


def test_a_batch_keeps_each_sequences_pictures_when_it_is_cut() -> None:
    driver = driver_of(encoder_tokens=20)
    for name in "ab":
        driver.add(asking(name, (name, 6)))
    batch = driver.scheduler.schedule(1.0)
    part = batch.select([1])
    (shown,) = part.pictures
    assert shown == batch.pictures[1]._replace(row=1)
    assert part.picture_owners == [0]
