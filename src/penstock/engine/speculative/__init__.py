"""Speculation: guessing tokens that a step then verifies together, as many as are likely to pay."""

from penstock.engine.speculative.adaptive import DraftLengths
from penstock.engine.speculative.drafter import Drafter, Offer
from penstock.engine.speculative.lookup import Index, LookupDrafter
from penstock.engine.speculative.ngram import NgramIndex
from penstock.engine.speculative.speculator import SpeculationCounters, Speculator
from penstock.engine.speculative.suffix import SuffixIndex
from penstock.engine.speculative.verify import kept_tokens

__all__ = [
    "DraftLengths",
    "Drafter",
    "Index",
    "LookupDrafter",
    "NgramIndex",
    "Offer",
    "SpeculationCounters",
    "Speculator",
    "SuffixIndex",
    "kept_tokens",
]
