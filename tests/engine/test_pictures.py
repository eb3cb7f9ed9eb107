"""Pictures in the engine: scheduling, batching and caching must not change a single token of what is said of them."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import torch
from torch import Tensor

from penstock.engine.engine import Engine
from penstock.engine.runner.encoder import LocalEncoder
from penstock.images.families import load_processor
from penstock.models.decoder import load_model
from penstock.models.vision import Inserted, RotaryPositions
from penstock.models.vision.layers import Parts, finish
from penstock.models.vision.load import load_vision
from penstock.models.vision.visible import seen_both_ways, visible_tokens
from penstock.protocol import BeamParams, GenerateRequest, Picture, TokenDelta
from tests.engines import build_engine, greedy, is_whole, run_to_end, tokens_of
from tests.packing import layout_of
from tests.seeing_models import SEEING, THREE_AXES, drawing, upstream_model, with_images

Asking = Callable[..., GenerateRequest]


@pytest.fixture
def path(seeing_checkpoint: Callable[[str], Path]) -> Path:
    return seeing_checkpoint("llava")


@pytest.fixture
def ask(path: Path) -> Asking:
    """Return what makes a greedy request of text with an ``@`` for each drawing."""
    processor = load_processor(path)
    assert processor is not None

    def asking(
        name: str, text: str, drawings: Sequence[int] = (), max_tokens: int = 12, **sampling: object
    ) -> GenerateRequest:
        images = [drawing(40 + 9 * seed, 70 - 5 * seed, seed) for seed in drawings]
        token_ids, pictures = with_images(path, processor, text, images)
        request = greedy(name, token_ids, max_tokens, logprobs=2, **sampling)
        return msgspec.structs.replace(request, pictures=tuple(pictures))

    return asking


def crowd(ask: Asking) -> list[GenerateRequest]:
    """Return requests of text, an image, many images, shared images and other questions about them."""
    return [
        ask("text", "what is a penstock?"),
        ask("one", "@what is this?", [1]),
        ask("again", "@what is this?", [1]),
        ask("question", "@and where is it?", [1]),
        ask("other", "@what is this?", [2]),
        ask("many", "first @ then @ and @ at last @.", [3, 1, 4, 3]),
        ask("end", "look at @", [5]),
        ask("short", "@", [6], 2),
    ]


def said(deltas: Sequence[TokenDelta]) -> tuple[list[int], list[float]]:
    """Return tokens and their log probabilities."""
    return tokens_of(list(deltas)), [one.chosen.logprob for delta in deltas for one in delta.logprobs]


def alone(path: Path, request: GenerateRequest) -> tuple[list[int], list[float]]:
    return said(run_to_end(build_engine(path, prefix_caching=False), [request])[request.request_id])


def is_seen(engine: Engine) -> bool:
    """Whether the engine is whole and nobody holds features."""
    cache = engine._scheduler.encoding.features
    return is_whole(engine) and not any(features.num_holders for features in cache._by_name.values())


@torch.no_grad()
def upstream_greedy(path: Path, request: GenerateRequest, num_tokens: int) -> list[int]:
    """Return what transformers' model says, given our features: pixels are compared elsewhere."""
    model = upstream_model(path)
    embeddings: Tensor = model.get_input_embeddings()(torch.tensor([request.prompt_token_ids]))
    encoder = load_vision(path, "float32")
    assert encoder is not None
    for picture, features in zip(request.pictures, encoder.encode(request.pictures), strict=True):
        embeddings[0, picture.offset : picture.offset + picture.num_tokens] = features
    output = model.generate(
        inputs_embeds=embeddings,
        attention_mask=torch.ones(embeddings.shape[:2], dtype=torch.int64),
        do_sample=False,
        max_new_tokens=num_tokens,
        min_new_tokens=num_tokens,
        eos_token_id=None,
        pad_token_id=0,
    )
    tokens: list[int] = output[0].tolist()
    return tokens


def test_tokens_equal_transformers(path: Path, ask: Asking) -> None:
    for request in crowd(ask):
        if request.pictures:
            num_tokens = request.sampling.max_tokens
            assert alone(path, request)[0] == upstream_greedy(path, request, num_tokens)
    one, other = alone(path, ask("one", "@what is this?", [1])), alone(path, ask("other", "@what is this?", [2]))
    assert one[0] != other[0], "a model that sees nothing would hide a wrong picture"


@torch.inference_mode()
def first_logprob(path: Path, request: GenerateRequest) -> float:
    """Return the log probability of the likeliest first token by one pass over the whole prompt."""
    model, encoder = load_model(path, dtype="float32"), load_vision(path, "float32")
    assert encoder is not None
    assert model.config.vision is not None
    T, pictures = len(request.prompt_token_ids), request.pictures
    blocks = list(range(-(-T // 4)))
    layout = layout_of([T], [T], [blocks], 4)
    extents = seen_both_ways(model.config.vision, pictures, T)
    if extents:
        layout = replace(layout, visible=torch.from_numpy(visible_tokens(extents, 0, T)))
    if model.config.vision.has_three_axes:
        layout = replace(layout, positions=torch.from_numpy(RotaryPositions(pictures).of(0, T)))
    rows = [torch.arange(one.offset, one.offset + one.num_tokens) for one in pictures]
    inserted = Inserted(torch.cat(rows), torch.cat(encoder.encode(pictures)))
    cache = model.new_cache(len(blocks), 4)
    hidden = model.forward(torch.tensor(request.prompt_token_ids), layout, cache, inserted=inserted)
    return float(model.logits(hidden[-1:]).log_softmax(-1).max())


@pytest.mark.parametrize("family", [*(name for name, one in SEEING.items() if not one.reads_whole), *THREE_AXES])
def test_every_family_sees_the_same_however_its_prompt_is_cut(
    family: str, seeing_checkpoint: Callable[[str], Path]
) -> None:
    path = seeing_checkpoint(family)
    processor = load_processor(path)
    assert processor is not None
    images = [drawing(50, 60, 1), drawing(90, 30, 2)]
    token_ids, pictures = with_images(path, processor, "@what is @?", images)
    request = msgspec.structs.replace(greedy("one", token_ids, 8, logprobs=0), pictures=tuple(pictures))
    most = max(picture.num_tokens for picture in pictures)
    whole = said(run_to_end(build_engine(path, step_tokens=512, encoder_patches=4096), [request])["one"])
    cut = build_engine(path, step_tokens=most + 3, encoder_patches=8)
    tokens, logprobs = said(run_to_end(cut, [request])["one"])
    assert tokens == whole[0]
    assert logprobs == pytest.approx(whole[1], abs=1e-4)
    assert whole[1][0] == pytest.approx(first_logprob(path, request), abs=1e-4)
    # The prefix cache may end within an image.
    longer = msgspec.structs.replace(request, request_id="two", prompt_token_ids=[*token_ids, 65, 66])
    assert said(run_to_end(cut, [longer])["two"])[0] == alone(path, longer)[0]
    assert is_seen(cut)


@pytest.mark.parametrize("step_tokens", [7, 33, 512])
@pytest.mark.parametrize("prefix_caching", [True, False])
def test_a_mixed_crowd_says_what_each_says_alone(
    prefix_caching: bool, step_tokens: int, path: Path, ask: Asking
) -> None:
    engine = build_engine(
        path, step_tokens=step_tokens, prefix_caching=prefix_caching, encoder_patches=20, encoder_cache_bytes=40 * 256
    )
    requests = crowd(ask)
    for turn in range(2):
        named = [msgspec.structs.replace(one, request_id=f"{one.request_id}-{turn}") for one in requests]
        deltas = run_to_end(engine, named)
        for request in requests:
            tokens, logprobs = said(deltas[f"{request.request_id}-{turn}"])
            expected_tokens, expected_logprobs = alone(path, request)
            assert tokens == expected_tokens
            assert logprobs == pytest.approx(expected_logprobs, abs=1e-4)
    assert is_seen(engine)
    seeing = engine.status().seeing
    assert seeing is not None
    assert seeing.num_encoded_pictures == seeing.num_feature_queries - seeing.num_feature_hits > 0
    assert seeing.feature_bytes <= seeing.most_feature_bytes
    if prefix_caching:
        assert engine.status().counters.num_prefix_hits > 100


def test_a_shared_image_is_encoded_once_and_a_second_question_prefills_only_itself(path: Path, ask: Asking) -> None:
    engine = build_engine(path)
    run_to_end(engine, [ask(f"r{i}", "@what is this?", [1]) for i in range(5)])
    seeing = engine.status().seeing
    assert seeing is not None
    assert (seeing.num_encoded_pictures, seeing.num_feature_queries, seeing.num_feature_hits) == (1, 5, 4)
    request = ask("next", "@how large is it?", [1])
    usage = run_to_end(engine, [request])["next"][-1].usage
    assert usage is not None
    num_shared = request.pictures[0].offset + request.pictures[0].num_tokens
    assert usage.num_cached_tokens == num_shared // 4 * 4
    other = run_to_end(engine, [ask("other", "@how large is it?", [2])])["other"][-1].usage
    assert other is not None
    assert other.num_cached_tokens < 4


def test_choices_beams_and_guesses_see_the_same(path: Path, ask: Asking) -> None:
    expected, _ = alone(path, ask("one", "@what is this?", [1]))
    engine = build_engine(path, speculate="ngram", step_tokens=64)
    deltas = run_to_end(engine, [ask("n", "@what is this?", [1], n=3), ask("plain", "@what is this?", [1])])
    assert [tokens_of(deltas["n"], index) for index in range(3)] == [expected] * 3
    assert tokens_of(deltas["plain"]) == expected
    beams = [ask(str(i), "@what is this?", [i], beam=BeamParams(width=2)) for i in (1, 2)]
    together = run_to_end(engine, beams)
    for request in beams:
        only = run_to_end(build_engine(path, prefix_caching=False), [request])[request.request_id]
        assert tokens_of(together[request.request_id]) == tokens_of(only)
    assert is_seen(engine)


def test_preempted_requests_see_again(path: Path, ask: Asking) -> None:
    requests = [ask(f"long-{i}", "@what is this?", [i], 40) for i in range(6)]
    engine = build_engine(path, num_blocks=60, encoder_cache_bytes=40 * 256)
    run_to_end(engine, [ask(f"short-{i}", "@", [i], 1) for i in range(3)])
    deltas = run_to_end(engine, requests)
    assert engine.status().counters.num_preemptions > 0
    for request in requests:
        assert tokens_of(deltas[request.request_id]) == alone(path, request)[0]
    assert is_seen(engine)


class _Choking:
    """An encoder that cannot take one picture."""

    num_parameters = 0
    weights_bytes = 0

    def __init__(self, path: Path, poison: bytes, *, loses_a_row: bool) -> None:
        encoder = load_vision(path, "float32")
        assert encoder is not None
        self._encoder = encoder
        self.work, self.patch_work = encoder.work, encoder.patch_work
        self._poison = poison
        self._loses_a_row = loses_a_row

    def encode(self, pictures: Sequence[Picture]) -> list[Tensor]:
        return finish(self.encoding(pictures))

    def encoding(self, pictures: Sequence[Picture]) -> Parts[list[Tensor]]:
        parts = self._encoder.encoding(pictures)
        yield next(parts)
        is_poisoned = [picture.key == self._poison for picture in pictures]
        if any(is_poisoned) and not self._loses_a_row:
            raise RuntimeError("choked")
        tensors = yield from parts
        return [rows[:-1] if is_bad else rows for rows, is_bad in zip(tensors, is_poisoned, strict=True)]


@pytest.mark.parametrize("loses_a_row", [False, True])
@pytest.mark.parametrize("step_patches", [4, None])
def test_a_picture_that_cannot_be_encoded_fails_its_requests_alone(
    step_patches: int | None, loses_a_row: bool, path: Path, ask: Asking
) -> None:
    bad = ask("bad", "hm @", [9])
    encoder = _Choking(path, bad.pictures[0].key, loses_a_row=loses_a_row)
    engine = build_engine(path, source=LocalEncoder(encoder, step_patches=step_patches))
    requests = crowd(ask)
    deltas = run_to_end(engine, [*requests[:4], bad, *requests[4:]])
    error = deltas["bad"][-1].error
    assert error is not None
    assert error.code == "encoding_failed"
    assert ("a row of features" if loses_a_row else "choked") in error.message
    for request in requests:
        assert tokens_of(deltas[request.request_id]) == alone(path, request)[0]
    assert is_seen(engine)


class _Counting:
    """An encoder that notes the work of each part."""

    num_parameters = 0
    weights_bytes = 0

    def __init__(self, path: Path) -> None:
        encoder = load_vision(path, "float32")
        assert encoder is not None
        self._encoder = encoder
        self.work, self.patch_work = encoder.work, encoder.patch_work
        self.parts: list[int] = []

    def encode(self, pictures: Sequence[Picture]) -> list[Tensor]:
        return finish(self.encoding(pictures))

    def encoding(self, pictures: Sequence[Picture]) -> Parts[list[Tensor]]:
        parts = self._encoder.encoding(pictures)
        while True:
            try:
                self.parts.append(next(parts))
            except StopIteration as end:
                features: list[Tensor] = end.value
                return features
            yield self.parts[-1]


@pytest.mark.parametrize("family", ["llava", "gemma3-vision", "qwen2-vl", "qwen2.5-vl"])
def test_nobody_who_decodes_waits_for_more_than_a_steps_budget(
    family: str, seeing_checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("penstock.models.vision.attention.ROWS_AT_ONCE", 8)
    path = seeing_checkpoint(family)
    processor = load_processor(path)
    assert processor is not None
    token_ids, pictures = with_images(path, processor, "@what is this?", [drawing(150, 120, 1)])
    seeing = msgspec.structs.replace(greedy("seeing", token_ids, 4, logprobs=0), pictures=tuple(pictures))
    step_tokens, step_patches = pictures[0].num_tokens + 8, 4
    encoder = _Counting(path)
    source = LocalEncoder(encoder, step_patches=step_patches)
    assert source.cost(pictures[0]) > 3
    engine = build_engine(path, step_tokens=step_tokens, num_blocks=1024, source=source)
    decoding = greedy("decoding", list(range(9)), 200)
    engine.add(decoding)
    engine.step()
    engine.add(seeing)
    said_of_it: list[TokenDelta] = []
    num_slices = 0
    while "seeing" in engine._requests:
        encoder.parts.clear()
        deltas = engine.step()
        assert sum(len(one.token_ids) for one in deltas if one.request_id == "decoding") == 1, "a token in every step"
        said_of_it += [one for one in deltas if one.request_id == "seeing"]
        num_slices += bool(encoder.parts)
        assert sum(encoder.parts[:-1]) < step_patches * encoder.patch_work
    assert num_slices > source.cost(pictures[0]) / 2
    timeline = said_of_it[-1].timeline
    assert timeline is not None
    assert timeline.admitted_s is not None
    assert timeline.first_token_s is not None
    assert 0 < timeline.waited_s["images"] < timeline.first_token_s - timeline.admitted_s
    assert said(said_of_it)[0] == alone(path, seeing)[0]
    engine.abort("decoding")
    assert is_seen(engine)


@pytest.mark.parametrize(("step_patches", "num_steps_of_small"), [(20, 1), (4, 5)])
def test_a_small_image_is_seen_before_a_large_one_is_done(
    step_patches: int,
    num_steps_of_small: int,
    seeing_checkpoint: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("penstock.models.vision.attention.ROWS_AT_ONCE", 8)
    path = seeing_checkpoint("qwen2-vl")
    processor = load_processor(path)
    assert processor is not None
    requests = []
    for name, side in (("large", 112), ("small", 56)):
        token_ids, pictures = with_images(path, processor, "@what is this?", [drawing(side, side, side)])
        requests.append(msgspec.structs.replace(greedy(name, token_ids, 2, logprobs=0), pictures=tuple(pictures)))
    encoder = load_vision(path, "float32")
    assert encoder is not None
    source = LocalEncoder(encoder, step_patches=step_patches)
    large, small = (source.cost(request.pictures[0]) for request in requests)
    assert num_steps_of_small - 1 < small <= num_steps_of_small < large
    engine = build_engine(path, num_blocks=1024, source=source)
    for request in requests:
        engine.add(request)
    finished: list[str] = []
    deltas: dict[str, list[TokenDelta]] = {request.request_id: [] for request in requests}
    while engine.has_work:
        for delta in engine.step():
            deltas[delta.request_id].append(delta)
            if delta.finish_reason is not None:
                finished.append(delta.request_id)
    assert finished == ["small", "large"]
    for request in requests:
        assert said(deltas[request.request_id])[0] == alone(path, request)[0]
    assert is_seen(engine)


def test_a_long_image_that_nobody_waits_for_is_given_up(path: Path, ask: Asking) -> None:
    encoder = load_vision(path, "float32")
    assert encoder is not None
    source = LocalEncoder(encoder, step_patches=4)
    engine = build_engine(path, source=source)
    engine.add(ask("seeing", "@what is this?", [1]))
    engine.step()
    assert source.is_behind
    assert engine.has_work
    engine.abort("seeing")
    text = ask("text", "what is a penstock?")
    assert said(run_to_end(engine, [text])["text"]) == alone(path, text)
    assert not source.is_behind
    seeing = ask("seeing", "@what is this?", [1])
    assert said(run_to_end(engine, [seeing])["seeing"])[0] == alone(path, seeing)[0]
    assert is_seen(engine)


def test_leaving_releases_features(path: Path, ask: Asking) -> None:
    engine = build_engine(path, step_tokens=8)
    for i in range(4):
        engine.add(ask(f"r{i}", "@what is this?", [i]))
    engine.step()
    assert not is_seen(engine)
    for i in range(4):
        engine.abort(f"r{i}")
    assert is_seen(engine)
    assert not engine.has_work


def test_steps_without_a_picture_stay_on_the_tape(path: Path, ask: Asking, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = build_engine(path)
    runner = engine._runner
    if runner._replay is None:  # type: ignore[attr-defined]
        pytest.skip("the native kernels were not built")
    shown: list[int] = []
    forward = runner._model.forward  # type: ignore[attr-defined]

    def counting(token_ids: Tensor, *others: object) -> Tensor:
        shown.append(len(token_ids))
        hidden: Tensor = forward(token_ids, *others)
        return hidden

    run_to_end(engine, [ask("before", "what is a penstock?")])
    monkeypatch.setattr(runner._model, "forward", counting)  # type: ignore[attr-defined]
    run_to_end(engine, [ask("seeing", "@what is this?", [1], 6), ask("text", "and this?", (), 9)])
    assert len(shown) == 1, "the one step that showed the picture"
