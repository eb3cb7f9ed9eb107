"""Text in and out of a model: tokens, incremental detokenizing, stop strings.

Chat templates are in ``chat_template``, for an engine's process has no use for them, and importing them takes long.
"""

from penstock.text.detokenizer import Detokenizer
from penstock.text.stop import StopMatcher
from penstock.text.tokenizer import Tokenizer

__all__ = ["Detokenizer", "StopMatcher", "Tokenizer"]
