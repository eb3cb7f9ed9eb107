"""The engine's metrics, under the names that dashboards and routers already read (``vllm:*``).

Gauges and counters are read from the engine's status when scraped; histograms are fed delta by delta on the client's
side, where formatting them costs the step loop nothing.
"""

import time
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from penstock.protocol import EngineStatus, GenerateRequest, SeeingStatus, TokenDelta

_FIRST_TOKEN_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
_BETWEEN_TOKENS_S = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
_REQUEST_S = (0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 60.0, 120.0, 300.0)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)


class EngineMetrics:
    """All metrics of one engine, in one registry."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        registry = registry or CollectorRegistry()
        self.registry = registry
        self._last_token_s: dict[tuple[str, int], float] = {}
        self._started_s: dict[str, float] = {}
        self._ttft = Histogram(
            "vllm:time_to_first_token_seconds",
            "Time from a request's arrival at the engine to its first token.",
            buckets=_FIRST_TOKEN_S,
            registry=registry,
        )
        self._itl = Histogram(
            "vllm:inter_token_latency_seconds",
            "Time between two tokens of one choice.",
            buckets=_BETWEEN_TOKENS_S,
            registry=registry,
        )
        self._e2e = self._request_histogram(
            "vllm:e2e_request_latency_seconds", "Time from a request's arrival at the engine to its end."
        )
        self._queue = self._request_histogram(
            "vllm:request_queue_time_seconds", "Time a request waited to be admitted."
        )
        self._images = self._request_histogram(
            "penstock_request_image_wait_seconds",
            "Time from a request's admission to its first token in which it waited for images to be encoded.",
        )
        self._prefill = self._request_histogram(
            "vllm:request_prefill_time_seconds", "Time from a request's admission to its first token."
        )
        self._decode = self._request_histogram(
            "vllm:request_decode_time_seconds", "Time from a request's first token to its last."
        )
        self._prompt_tokens = Histogram(
            "vllm:request_prompt_tokens", "Prompt tokens of a request.", buckets=_TOKENS, registry=registry
        )
        self._generation_tokens = Histogram(
            "vllm:request_generation_tokens", "Tokens a choice generated.", buckets=_TOKENS, registry=registry
        )
        self._success = Counter(
            "vllm:request_success",
            "Choices that ended, by how.",
            labelnames=("finished_reason",),
            registry=registry,
        )
        for reason in ("stop", "length", "abort"):
            self._success.labels(reason)
        self._failures = Counter(
            "penstock_request_failures",
            "Requests that ended with an error, by its code.",
            labelnames=("code",),
            registry=registry,
        )

    def _request_histogram(self, name: str, documentation: str) -> Histogram:
        return Histogram(name, documentation, buckets=_REQUEST_S, registry=self.registry)

    def watch(self, status: Callable[[], EngineStatus]) -> None:
        """Export gauges and counters from ``status``, read at each scrape."""
        self.registry.register(_StatusCollector(status))

    def started(self, request: GenerateRequest) -> None:
        """A request was sent to the engine."""
        self._started_s[request.request_id] = time.monotonic()
        self._prompt_tokens.observe(len(request.prompt_token_ids))

    def aborted(self, request_id: str) -> None:
        """The client of a request left."""
        self._success.labels("abort").inc()
        self._forget(request_id)

    def observe(self, delta: TokenDelta) -> None:
        """Count a delta of a running request."""
        if delta.error is not None:
            self._failures.labels(delta.error.code).inc()
            self._forget(delta.request_id)
            return
        now_s = time.monotonic()
        key = (delta.request_id, delta.index)
        last_s = self._last_token_s.get(key)
        if last_s is not None:
            self._itl.observe(now_s - last_s)
        elif delta.index == 0 and delta.token_ids:
            self._ttft.observe(now_s - self._started_s.get(delta.request_id, now_s))
        self._last_token_s[key] = now_s
        if delta.finish_reason is not None:
            self._finished(delta)

    def _finished(self, delta: TokenDelta) -> None:
        self._success.labels(delta.finish_reason).inc()
        del self._last_token_s[delta.request_id, delta.index]
        if delta.usage is not None and delta.usage.num_output_tokens:
            self._generation_tokens.observe(delta.usage.num_output_tokens)
        timeline = delta.timeline
        if delta.index == 0:
            self._started_s.pop(delta.request_id, None)
        if timeline is None or timeline.finished_s is None:
            return
        self._e2e.observe(timeline.finished_s)
        if timeline.admitted_s is not None:
            self._queue.observe(timeline.admitted_s)
            if "images" in timeline.waited_s:
                self._images.observe(timeline.waited_s["images"])
            if timeline.first_token_s is not None:
                self._prefill.observe(timeline.first_token_s - timeline.admitted_s)
                self._decode.observe(timeline.finished_s - timeline.first_token_s)

    def _forget(self, request_id: str) -> None:
        self._started_s.pop(request_id, None)
        for key in [key for key in self._last_token_s if key[0] == request_id]:
            del self._last_token_s[key]


class _StatusCollector(Collector):
    """Reads an engine's status at each scrape."""

    def __init__(self, status: Callable[[], EngineStatus]) -> None:
        self._status = status

    def collect(self) -> Iterator[Metric]:
        """Yield every gauge and counter."""
        status = self._status()
        seeing = status.seeing or SeeingStatus()
        for name, documentation, value in (*_gauges(status), *_seeing_gauges(seeing)):
            yield GaugeMetricFamily(name, documentation, value=float(value))
        for name, documentation, value in (*_totals(status), *_seeing_totals(seeing)):
            yield CounterMetricFamily(name, documentation, value=float(value))
        if status.model is not None:
            memory = status.model.memory
            # Routers read the number of blocks under this name on any device.
            yield InfoMetricFamily(
                "vllm:cache_config",
                "The cache as it was sized at start.",
                value={"block_size": str(memory.block_size), "num_gpu_blocks": str(memory.num_blocks)},
            )


_Rows = tuple[tuple[str, str, float], ...]
"""(name, documentation, value) of each metric"""


def _gauges(status: EngineStatus) -> _Rows:
    counters = status.counters
    return (
        ("vllm:num_requests_running", "Sequences that hold cache blocks.", status.num_running),
        ("vllm:num_requests_waiting", "Sequences in the queue.", status.num_waiting),
        ("vllm:kv_cache_usage_perc", "Share of cache blocks held by requests, 0 to 1.", status.kv_cache_usage),
        ("penstock_engine_ready", "1 while the engine takes requests.", status.state == "ready"),
        ("penstock_waiting_tokens", "Tokens of the sequences in the queue.", status.num_waiting_tokens),
        (
            "penstock_speculation_acceptance_rate",
            "Share of guessed tokens that came true since the engine started, 0 to 1.",
            counters.acceptance_rate,
        ),
        (
            "penstock_speculation_speedup",
            "How many times as fast decoding has been as without guesses, as measured since the engine started.",
            counters.speculation_speedup,
        ),
    )


def _totals(status: EngineStatus) -> _Rows:
    counters = status.counters
    return (
        ("vllm:prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", counters.num_prefix_queries),
        ("vllm:prefix_cache_hits", "Prompt tokens found in the prefix cache.", counters.num_prefix_hits),
        ("vllm:prompt_tokens", "Prompt tokens of requests that ended.", counters.num_prompt_tokens),
        ("vllm:generation_tokens", "Tokens generated.", counters.num_generation_tokens),
        ("vllm:num_preemptions", "Times a sequence gave up its blocks.", counters.num_preemptions),
        ("vllm:spec_decode_num_drafts", "Times tokens were guessed and verified.", counters.num_drafts),
        ("vllm:spec_decode_num_draft_tokens", "Tokens guessed.", counters.num_draft_tokens),
        ("vllm:spec_decode_num_accepted_tokens", "Guessed tokens that came true.", counters.num_accepted_tokens),
        (
            "penstock_decode_seconds",
            "Seconds in steps where every sequence decoded, where there is speculation.",
            counters.decode_s,
        ),
        (
            "penstock_undrafted_decode_seconds",
            "What the tokens of those would have taken without guesses, by steps that had none.",
            counters.undrafted_decode_s,
        ),
        ("penstock_engine_steps", "Steps the engine ran.", counters.num_steps),
        ("penstock_recomputed_tokens", "Tokens computed again after preemption.", counters.num_recomputed_tokens),
        ("penstock_evicted_blocks", "Cached blocks that were given away.", counters.num_evicted_blocks),
        ("penstock_engine_restarts", "Times the engine process was started again.", status.num_restarts),
    )


def _seeing_gauges(seeing: SeeingStatus) -> _Rows:
    return (
        ("penstock_image_feature_bytes", "Bytes of what images were encoded to.", seeing.feature_bytes),
        ("penstock_encoder_workers_ready", "Processes that encode images now.", seeing.num_ready_workers),
    )


def _seeing_totals(seeing: SeeingStatus) -> _Rows:
    return (
        (
            "penstock_image_feature_queries",
            "Times a sequence needed what an image was encoded to.",
            seeing.num_feature_queries,
        ),
        ("penstock_image_feature_hits", "Of those, times it was there or on its way.", seeing.num_feature_hits),
        (
            "penstock_evicted_image_features",
            "Images whose features were given up for others'.",
            seeing.num_evicted_features,
        ),
        ("penstock_encoded_images", "Images, tiles of one or videos encoded.", seeing.num_encoded_pictures),
        ("penstock_encoded_image_tokens", "Prompt tokens that those became.", seeing.num_encoded_tokens),
        ("penstock_image_encode_seconds", "Seconds that encoders took.", seeing.encode_s),
        (
            "penstock_encoder_worker_restarts",
            "Times a process that encodes images was started again.",
            seeing.num_worker_restarts,
        ),
    )
