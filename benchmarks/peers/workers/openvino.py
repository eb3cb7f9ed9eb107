"""OpenVINO GenAI's continuous batching as a worker: `openvino.py MODEL THREADS CACHE_BLOCKS MAX_RUNNING`."""

import sys
from collections.abc import Iterator

from benchmarks.peers.workers import lines


class OpenVino:
    """A `ContinuousBatchingPipeline`, stepped from outside."""

    def __init__(self, model: str, threads: int, num_blocks: int, max_running: int) -> None:
        import numpy as np
        import openvino as ov
        import openvino_genai as genai

        self._genai, self._ov, self._np = genai, ov, np
        scheduler = genai.SchedulerConfig()
        scheduler.num_kv_blocks = num_blocks
        scheduler.max_num_seqs = max_running
        scheduler.max_num_batched_tokens = STEP_TOKENS
        self._pipeline = genai.ContinuousBatchingPipeline(
            model, scheduler, "CPU", {"INFERENCE_NUM_THREADS": threads, "ENABLE_CPU_PINNING": False}
        )
        self._handles: dict[str, genai.GenerationHandle] = {}
        self._num_requests = 0

    def add(self, request_id: str, prompt: list[int], num_tokens: int) -> None:
        """Queue a request."""
        config = self._genai.GenerationConfig(
            max_new_tokens=num_tokens, min_new_tokens=num_tokens, ignore_eos=True, do_sample=False
        )
        token_ids = self._ov.Tensor(self._np.array([prompt], dtype=self._np.int64))
        self._handles[request_id] = self._pipeline.add_request(self._num_requests, token_ids, config)
        self._num_requests += 1

    @property
    def has_work(self) -> bool:
        """Whether a request is under way."""
        return bool(self._handles)

    def step(self) -> Iterator[lines.Added]:
        """Run one step."""
        self._pipeline.step()
        for request_id, handle in list(self._handles.items()):
            num_tokens = 0
            while handle.can_read():
                num_tokens += sum(len(output.generated_ids) for output in handle.read().values())
            finished = handle.get_status() == self._genai.GenerationStatus.FINISHED
            if finished:
                del self._handles[request_id]
            if num_tokens or finished:
                yield lines.Added(request_id, num_tokens, finished)


STEP_TOKENS = 512
"""Prompt tokens a step may take; the default of 256 prefills more slowly"""

if __name__ == "__main__":
    output = lines.take_output()
    lines.run(OpenVino(sys.argv[1], *map(int, sys.argv[2:])), output)
