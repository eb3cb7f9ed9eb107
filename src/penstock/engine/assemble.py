"""Put an engine together from a loaded model. The only module of the engine that knows all its parts."""

from penstock.engine.config import EngineConfig
from penstock.engine.engine import Engine
from penstock.engine.kv import BlockPool, CacheManager
from penstock.engine.runner import CPURunner
from penstock.engine.sampling import Sampler
from penstock.engine.scheduler import Scheduler
from penstock.models.decoder import DecoderModel
from penstock.protocol import ModelInfo
from penstock.text import Tokenizer


def assemble_engine(model: DecoderModel, tokenizer: Tokenizer, config: EngineConfig, *, info: ModelInfo) -> Engine:
    """Return an engine whose cache is as large as ``info.memory`` says."""
    plan = info.memory
    cache = CacheManager(
        BlockPool(plan.num_blocks),
        block_size=plan.block_size,
        prefix_caching=config.cache.prefix_caching,
        window=model.config.window,
    )
    return Engine(
        runner=CPURunner(
            model,
            model.new_cache(plan.num_blocks, plan.block_size),
            Sampler(vocab_size=info.vocab_size, eos_token_ids=info.eos_token_ids),
            block_size=plan.block_size,
        ),
        scheduler=Scheduler(config.scheduler, cache),
        tokenizer=tokenizer,
        model=info,
    )
