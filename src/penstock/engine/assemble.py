"""Put an engine together from a loaded model. The only module of the engine that knows all its parts."""

from penstock.engine.config import EngineConfig
from penstock.engine.engine import Engine
from penstock.engine.kv import BlockPool, CacheManager
from penstock.engine.profile import Profiler
from penstock.engine.runner import CPURunner, Runner
from penstock.engine.sampling import Sampler
from penstock.engine.scheduler import Scheduler
from penstock.models.model import LanguageModel
from penstock.protocol import ModelInfo
from penstock.text import Tokenizer


def assemble_engine(
    model: LanguageModel,
    tokenizer: Tokenizer,
    config: EngineConfig,
    *,
    info: ModelInfo,
    profiler: Profiler | None = None,
) -> Engine:
    """Return an engine whose cache is as large as ``info.memory`` says, its parts watched by ``profiler``."""
    plan = info.memory
    cache = CacheManager(
        BlockPool(plan.num_blocks),
        block_size=plan.block_size,
        prefix_caching=config.cache.prefix_caching,
        window=model.config.window,
    )
    runner: Runner = CPURunner(
        model if profiler is None else profiler.around_model(model),
        model.new_cache(plan.num_blocks, plan.block_size),
        Sampler(vocab_size=info.vocab_size, eos_token_ids=info.eos_token_ids),
        block_size=plan.block_size,
    )
    return Engine(
        runner=runner if profiler is None else profiler.around_runner(runner),
        scheduler=Scheduler(config.scheduler, cache),
        tokenizer=tokenizer,
        model=info,
        max_adapters=config.runner.max_adapters,
    )
