"""Which guesses were right.

Every row of a draft is sampled as the target samples by itself: from its own distribution there, with penalties, bans
and grammar as they stand behind the guesses before it, and with the random number that belongs to that place in the
output. A guess is kept if it is the token drawn. For a guess that was settled beforehand that is rejection sampling as
Leviathan et al. ("Fast Inference from Transformers via Speculative Decoding", 2023) define it, for a proposal that has
all its mass on one token: it is accepted with the target's probability of it, and a token drawn instead has the
target's distribution on the others. It goes further: what comes out is not only distributed as without speculation, it
is the same token.
"""

from collections.abc import Sequence

from penstock.engine.sampling import SampledToken


def kept_tokens(sampled: Sequence[SampledToken | None], draft: Sequence[int]) -> list[SampledToken]:
    """Return the tokens that count: as many guesses as came true, one after another, and one more.

    sampled  [1 + D] drawn with none, one, ... of the guesses taken as true; None where there was nothing to draw from
    draft    [D] the guesses
    What is drawn behind a guess that was wrong means nothing. Empty if the first is None.
    """
    kept: list[SampledToken] = []
    for row, token in enumerate(sampled):
        if token is None:
            break
        kept.append(token)
        if row == len(draft) or token.token_id != draft[row]:
            break
    return kept
