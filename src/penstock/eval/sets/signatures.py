"""Which parameters a function of the standard library takes: multiple choice made from its source."""

import random
from collections.abc import Iterable

from penstock.eval.sets.docstrings import DescribedObject
from penstock.eval.tasks.multiple_choice import ChoiceItem

NUM_CHOICES = 4


def signature_items(objects: Iterable[DescribedObject]) -> list[ChoiceItem]:
    """Return a question about each function with parameters; the wrong ones are other functions' of ``objects``.

    The same objects give the same questions: what is drawn depends on the function's name alone.
    """
    functions = [one for one in objects if one.parameters]
    known = sorted({one.parameters for one in functions if one.parameters})
    items = []
    for one in functions:
        assert one.parameters
        draw = random.Random(f"signature of {one.name}")
        wrong = draw.sample([other for other in known if other != one.parameters], NUM_CHOICES - 1)
        parameters = [*wrong, one.parameters]
        draw.shuffle(parameters)
        items.append(
            ChoiceItem(
                f"What is the signature of {one.name}?",
                tuple(f"{one.name}({text})" for text in parameters),
                parameters.index(one.parameters),
            )
        )
    return items
