"""Locally typical sampling (Meister et al., "Locally Typical Sampling", TACL 2023)."""

import numpy as np
import numpy.typing as npt


def atypical(scaled: npt.NDArray[np.float32], typical_p: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_]:
    """Return [R, V]: the tokens that are not typical.

    A token is the more typical the nearer its surprise, the negative logarithm of its probability, is to the
    distribution's entropy. Kept are the most typical ones, the fewest whose probability reaches ``typical_p``.

    scaled     [R, V] logits, divided by temperature; -inf where a token is ruled out
    typical_p  [R, 1] in (0, 1]
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        shifted = scaled - scaled.max(-1, keepdims=True)
        log_probabilities = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
        probabilities = np.exp(log_probabilities)
        # Zero times infinity: a token that cannot come adds nothing to the entropy.
        entropy = -np.nansum(probabilities * log_probabilities, axis=-1, keepdims=True)
        order = np.abs(log_probabilities + entropy).argsort(axis=-1, kind="stable")
    ordered = np.take_along_axis(probabilities, order, axis=1)
    # In doubles: small shares of a flat distribution would add nothing to a sum near one.
    keep = (ordered.cumsum(-1, dtype=np.float64) - ordered) < typical_p
    keep[:, 0] = True
    dropped: npt.NDArray[np.bool_] = np.empty_like(keep)
    np.put_along_axis(dropped, order, ~keep, axis=1)
    return dropped
