"""How near decoding is to reading its weights: `python -m benchmarks.read_share --quantize int4`.

Requests of one stream, of a published shape with random weights, in this process, without a server. Before and after
each all threads read as many bytes from huge pages as a step's weights take, five times, and the fastest counts: what
the memory gives changes within seconds on a shared machine. The share is weight bytes a second of a request's median
step by bytes read a second, on average before and after it; prints its median and quartiles, the read speed, and the
median step.
"""

import argparse
import gc
import random
import statistics
import time
from itertools import pairwise

from penstock.engine.config import RunnerConfig, SpeculationConfig
from penstock.engine.host import EngineHost
from penstock.engine.messages import Submit
from penstock.kernels import describe
from penstock.kernels.linear.cpu import PackedLinear
from penstock.kernels.native import NATIVE
from penstock.launch.engine import build_engine
from penstock.launch.settings import ModelSettings, Settings
from penstock.protocol import GenerateRequest, SamplingParams


def main() -> None:
    """Print the share and what it is made of."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="qwen2.5-0.5b")
    parser.add_argument("--quantize", choices=["int8", "int4", "w8a16", "w4a16"])
    parser.add_argument("--threads", type=int)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--steps", type=int, default=128, help="of each request")
    parser.add_argument("--requests", type=int, default=20)
    arguments = parser.parse_args()
    assert NATIVE is not None, "it is the compiled products that are measured"
    engine = build_engine(
        Settings(
            model=ModelSettings(name=f"shape:{arguments.shape}"),
            runner=RunnerConfig(quantize=arguments.quantize, threads=arguments.threads),
            speculation=SpeculationConfig(method="off"),
        )
    )
    weight_bytes = sum(one.num_bytes for one in gc.get_objects() if type(one) is PackedLinear)
    host = EngineHost(engine, lambda: None)
    numbers = random.Random(0)
    prompt = [numbers.randrange(engine.model.vocab_size) for _ in range(arguments.prompt_tokens)]
    sampling = SamplingParams(max_tokens=arguments.steps, temperature=0.0, ignore_eos=True)
    steps: list[float] = []
    reads = [NATIVE.read_bandwidth(weight_bytes)]
    shares: list[float] = []
    for i in range(arguments.requests):
        host.handle(Submit(GenerateRequest(request_id=str(i), prompt_token_ids=prompt, sampling=sampling)))
        host.step()
        ends = [time.perf_counter()]
        while host.has_work:
            host.step()
            ends.append(time.perf_counter())
        steps.append(statistics.median(later - sooner for sooner, later in pairwise(ends)))
        reads.append(NATIVE.read_bandwidth(weight_bytes))
        shares.append(weight_bytes / steps[-1] / statistics.mean(reads[-2:]))
    first, middle, last = statistics.quantiles(shares, n=4)
    print(
        f"{arguments.quantize or engine.model.dtype}, {describe()}: {weight_bytes / 1e6:.1f} MB a step, "
        f"{statistics.median(steps) * 1e3:.2f} ms; read at {statistics.median(reads) / 1e9:.1f} GB/s "
        f"({min(reads) / 1e9:.1f}..{max(reads) / 1e9:.1f}); share {middle:.2f} ({first:.2f}..{last:.2f})"
    )


if __name__ == "__main__":
    main()
