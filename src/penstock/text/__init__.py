"""Text in and out of a model: tokens, incremental detokenizing, stop strings, chat templates."""

from penstock.text.chat_template import ChatTemplate
from penstock.text.detokenizer import Detokenizer
from penstock.text.stop import StopMatcher
from penstock.text.tokenizer import Tokenizer

__all__ = ["ChatTemplate", "Detokenizer", "StopMatcher", "Tokenizer"]
