"""ONNX Runtime GenAI's engine as a worker: `onnxruntime.py MODEL THREADS MAX_RUNNING`."""

import json
import sys
from collections.abc import Iterator

from benchmarks.peers.workers import lines


class OnnxRuntime:
    """An `Engine`, which batches what its exported model lets it."""

    def __init__(self, model: str, threads: int, max_running: int) -> None:
        import numpy as np
        import onnxruntime_genai as genai

        self._genai, self._np = genai, np
        config = genai.Config(model)
        session = {"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}
        config.overlay(json.dumps({**session, "engine": {"static_batching": {"max_batch_size": max_running}}}))
        self._model = genai.Model(config)
        self._engine = genai.Engine(self._model)
        self._events = self._engine.create_event_buffer(max_running)
        self._requests: dict[str, genai.Request] = {}

    def add(self, request_id: str, prompt: list[int], num_tokens: int) -> None:
        """Queue a request."""
        request = self._requests[request_id] = self._engine.create_request()
        options = self._genai.TurnOptions(request)
        options.set_do_sample(False)
        options.set_min_generated_tokens(num_tokens)
        options.set_max_generated_tokens(num_tokens)
        request.begin_turn(self._np.array(prompt, dtype=self._np.int32), options)

    @property
    def has_work(self) -> bool:
        """Whether a request is under way."""
        return bool(self._requests)

    def step(self) -> Iterator[lines.Added]:
        """Run one step. Raises RuntimeError if the engine gave a request up."""
        flags = self._genai.EngineEventFlags
        names = {request: name for name, request in self._requests.items()}
        for event in self._engine.run(self._events):
            if event.flags.value & flags.FAILED.value:
                raise RuntimeError(f"request failed: {event.error_code}")
            name = names[event.request]
            finished = bool(event.flags.value & flags.TURN_FINISHED.value)
            if finished:
                self._requests.pop(name).close()
            yield lines.Added(name, int(bool(event.flags.value & flags.TOKEN.value)), finished)


if __name__ == "__main__":
    output = lines.take_output()
    lines.run(OnnxRuntime(sys.argv[1], *map(int, sys.argv[2:])), output)
