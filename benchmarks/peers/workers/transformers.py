"""transformers' continuous batching as a worker: `transformers.py MODEL THREADS CACHE_TOKENS`."""

import sys
from collections.abc import Iterator

from benchmarks.peers.workers import lines

_PAGE_TOKENS = 256
_STEP_TOKENS = 512
"""Tokens a step may process; left alone it is sized for a GPU, and so are the buffers made for it."""


class Transformers:
    """The continuous batching manager, which steps on a thread of its own."""

    def __init__(self, model: str, threads: int, cache_tokens: int) -> None:
        import torch
        import transformers

        torch.set_num_threads(threads)
        loaded = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()
        self._manager = loaded.init_continuous_batching(
            generation_config=transformers.GenerationConfig(do_sample=False, eos_token_id=-1),
            continuous_batching_config=transformers.ContinuousBatchingConfig(
                page_size=_PAGE_TOKENS, num_blocks=cache_tokens // _PAGE_TOKENS, max_batch_tokens=_STEP_TOKENS
            ),
        )
        self._manager.start()
        self._num_tokens: dict[str, int] = {}

    def add(self, request_id: str, prompt: list[int], num_tokens: int) -> None:
        """Queue a request."""
        self._num_tokens[request_id] = 0
        self._manager.add_request(prompt, request_id, num_tokens, streaming=True)

    @property
    def has_work(self) -> bool:
        """Whether a request is under way."""
        return bool(self._num_tokens)

    def step(self) -> Iterator[lines.Added]:
        """Wait for the next token of any request. Raises RuntimeError if there will be none."""
        output = self._manager.get_result(timeout=0.1)
        if output is None:
            if not self._manager.is_running():
                raise RuntimeError("the manager has stopped")
            return
        if output.error is not None:
            raise RuntimeError(output.error)
        num_tokens = len(output.generated_tokens) - self._num_tokens[output.request_id]
        self._num_tokens[output.request_id] += num_tokens
        if output.is_finished():
            del self._num_tokens[output.request_id]
        yield lines.Added(output.request_id, num_tokens, output.is_finished())


if __name__ == "__main__":
    output = lines.take_output()
    lines.run(Transformers(sys.argv[1], *map(int, sys.argv[2:])), output)
