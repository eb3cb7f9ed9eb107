"""A text as a model reads it for its perplexity: windows of tokens, side by side.

The protocol of the GPTQ paper (Frantar et al., 2022), in which published figures are given: the whole text is
tokenized once and cut into windows of ``window`` tokens that do not overlap, each is read by itself, and all of its
tokens but the first are predicted. The rest that fills no window is left out. Where the tokenizer begins a text with a
token of its own (BOS), every window begins with it and holds one token less of the text, all of which are then
predicted.
"""

from dataclasses import dataclass

from penstock.errors import InvalidSetting
from penstock.text import Tokenizer

DEFAULT_WINDOW = 2048


@dataclass(frozen=True, slots=True)
class TextWindows:
    """A tokenized text."""

    windows: tuple[tuple[int, ...], ...]
    """Each of as many tokens"""
    num_text_tokens: int
    """Of the whole text, what was left out included and BOS not"""
    num_words: int
    """Of the whole text, apart by white space"""

    @property
    def num_predicted(self) -> int:
        """Tokens that a model predicts in one window."""
        return len(self.windows[0]) - 1

    @property
    def words_per_token(self) -> float:
        """What turns a loss per token into one per word."""
        return self.num_words / self.num_text_tokens


def cut_windows(text: str, tokenizer: Tokenizer, *, window: int = DEFAULT_WINDOW, name: str = "text") -> TextWindows:
    """Return ``text`` in windows of ``window`` tokens. Raises ``InvalidSetting`` if it does not fill one."""
    if window < 2:
        raise InvalidSetting(f"a window of {window} tokens has nothing to predict; take at least 2 (--window)")
    ids = tokenizer.encode(text, add_special_tokens=False)
    begin = beginning_ids(tokenizer)
    size = window - len(begin)
    if len(ids) < size:
        raise InvalidSetting(
            f"{name} has {len(ids)} tokens, and one window takes {size}; lower --window to {len(ids)} or less, or take "
            "a longer text"
        )
    starts = range(0, len(ids) - size + 1, size)
    windows = tuple((*begin, *ids[start : start + size]) for start in starts)
    return TextWindows(windows, num_text_tokens=len(ids), num_words=len(text.split()))


def beginning_ids(tokenizer: Tokenizer) -> list[int]:
    """Return the BOS token if the tokenizer puts it before every text, as when a prompt is served; else nothing."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer.encode("a", add_special_tokens=True)[:1] == [bos] else []
