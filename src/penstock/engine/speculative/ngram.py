"""Prompt lookup: the last few tokens, looked up in the prompt.

After Saxena, "Prompt Lookup Decoding" (2023), and Yang et al., "Inference with Reference" (2023). The prompt is indexed
once, and nothing has to be kept up while the answer grows.
"""

from collections.abc import Sequence

from penstock.engine.speculative.lookup import Match

_LENGTH = 3
"""Tokens that have to be the same. Two are so often by accident that most guesses would be wasted."""


class NgramIndex:
    """Where each run of three tokens last stood in a prompt."""

    def __init__(self, prompt_token_ids: Sequence[int]) -> None:
        runs = zip(*(prompt_token_ids[first:] for first in range(_LENGTH)), strict=False)
        # What stands at the prompt's very end is followed by what is to be guessed.
        ends = range(_LENGTH, len(prompt_token_ids))
        self._ends = dict(zip(runs, ends, strict=False))

    def find(self, token_ids: Sequence[int]) -> Match | None:
        """Return where in the prompt the last three tokens stood last."""
        end = self._ends.get(tuple(token_ids[-_LENGTH:]))
        return None if end is None else Match(_LENGTH, end)
