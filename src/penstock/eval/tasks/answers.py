"""Short answers compared as SQuAD 1.1 does (Rajpurkar et al., 2016): without case, punctuation and articles."""

import re
import string
from collections import Counter

_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLE = re.compile(r"\b(a|an|the)\b")


def normalize(text: str) -> str:
    """Return ``text`` in lower case, without ASCII punctuation, then without articles, words one space apart."""
    return " ".join(_ARTICLE.sub(" ", text.lower().translate(_WITHOUT_PUNCTUATION)).split())


def exact_match(answer: str, reference: str) -> bool:
    """Whether both are the same when normalized."""
    return normalize(answer) == normalize(reference)


def f1(answer: str, reference: str) -> float:
    """Return the harmonic mean of precision and recall of the normalized words, each as often as it occurs."""
    given, wanted = Counter(normalize(answer).split()), Counter(normalize(reference).split())
    num_common = (given & wanted).total()
    return 2 * num_common / (given.total() + wanted.total()) if num_common else 0.0
