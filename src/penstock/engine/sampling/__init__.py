"""Picking tokens from logits, for the whole batch at once."""

from penstock.engine.sampling.masks import GrammarMasks, TokenMasks
from penstock.engine.sampling.sampler import SampledToken, Sampler

__all__ = ["GrammarMasks", "SampledToken", "Sampler", "TokenMasks"]
