"""Put an engine together from a loaded model. The only module of the engine that knows all its parts."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from penstock.engine.config import EngineConfig
from penstock.engine.encoding import EncodePlanner, EncodingDesk, FeatureCache
from penstock.engine.encoding.source import FEATURE_ELEMENT_BYTES, FeatureRows, FeatureSource
from penstock.engine.engine import Engine
from penstock.engine.kv import BlockPool, CacheManager
from penstock.engine.runner import CPURunner, Runner
from penstock.engine.runner.pictures import ShownPictures
from penstock.engine.sampling import Sampler
from penstock.engine.scheduler import Scheduler
from penstock.engine.speculative import Drafter, Index, LookupDrafter, NgramIndex, Speculator, SuffixIndex
from penstock.engine.speculative.draft_model import DraftModel
from penstock.models.model import LanguageModel
from penstock.protocol import ModelInfo
from penstock.text import Tokenizer

if TYPE_CHECKING:
    from penstock.engine.profiling import Profiler

_INDEXES: dict[str, Callable[[Sequence[int]], Index]] = {"ngram": NgramIndex, "suffix": SuffixIndex}


def assemble_engine(
    model: LanguageModel,
    tokenizer: Tokenizer,
    config: EngineConfig,
    *,
    info: ModelInfo,
    profiler: "Profiler | None" = None,
    draft: LanguageModel | None = None,
    source: FeatureSource | None = None,
) -> Engine:
    """Return an engine whose cache is as large as ``info.memory`` says, its parts watched by ``profiler``.

    ``draft`` is the model that guesses, if that is the method. ``source`` encodes pictures, if ``model`` sees any.
    """
    plan = info.memory
    cache = CacheManager(
        BlockPool(plan.num_blocks),
        block_size=plan.block_size,
        prefix_caching=config.cache.prefix_caching,
        # The draft model has to see what the target no longer needs.
        window=model.config.window if draft is None else None,
    )
    sampler = Sampler(vocab_size=info.vocab_size, eos_token_ids=info.eos_token_ids)
    planner: EncodePlanner | None = None
    feature_rows: dict[int, FeatureRows] = {}
    if source is not None:
        assert model.config.vision is not None, "whoever encodes pictures has a model that sees"
        planner = EncodePlanner(
            FeatureCache(most_bytes=plan.encoder_cache_bytes, token_bytes=FEATURE_ELEMENT_BYTES * info.hidden_size),
            cost=source.cost,
            step_tokens=config.scheduler.step_tokens,
            num_workers=source.counters.num_workers,
            sees_both_ways=model.config.vision.sees_both_ways,
            reads_prompts_whole=model.config.vision.reads_prompts_whole,
        )
    runner: Runner = CPURunner(
        model if profiler is None else profiler.around_model(model),
        model.new_cache(plan.num_blocks, plan.block_size),
        sampler,
        block_size=plan.block_size,
        step_tokens=config.scheduler.step_tokens,
        shown=ShownPictures(feature_rows, model.config.vision),
    )
    scheduler = Scheduler(config.scheduler, cache, encoding=planner)
    drafter: Drafter | None = None
    if draft is not None:
        drafter = DraftModel(draft, sampler, cache.pool, block_size=plan.block_size, reserve=scheduler.reserve)
    elif config.speculation.method in _INDEXES:
        drafter = LookupDrafter(_INDEXES[config.speculation.method])
    return Engine(
        runner=runner if profiler is None else profiler.around_runner(runner),
        scheduler=scheduler,
        tokenizer=tokenizer,
        model=info,
        max_adapters=config.runner.max_adapters,
        desk=EncodingDesk(scheduler.encoding.features, source, feature_rows),
        speculator=None if drafter is None else Speculator(drafter, most_tokens=config.speculation.max_tokens),
    )
