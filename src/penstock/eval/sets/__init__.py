"""Tasks of text, made from the running Python's standard library, and one of drawings. No machine has to fetch them.

Splits are fixed by the names of modules, which penstock-mini's recipe in ``training/`` leaves out as well. The data is
that of the running Python, so a result names its hash, and results with different ones are not compared.
"""

from collections.abc import Callable

from penstock.eval.sets.docstrings import RECALL_MODULES, described_objects, held_out_phrased
from penstock.eval.sets.drawings import draw
from penstock.eval.sets.library import Document, library_root, split_documents
from penstock.eval.sets.signatures import signature_items
from penstock.eval.tasks import GenerationTask, MultipleChoiceTask, PerplexityTask, Question, Task

__all__ = ["BUILT_IN", "OF_TEXT", "built_in_task", "held_out_text"]


def held_out_text() -> str:
    """Return the source of the held-out modules, files apart by an empty line."""
    return "\n\n".join(document.text for document in _held_out())


def _held_out() -> list[Document]:
    return split_documents(library_root())[1]


def _source(window: int) -> Task:
    return PerplexityTask("source", held_out_text(), window=window)


def _docstrings(window: int) -> Task:
    return GenerationTask("docstrings", held_out_phrased(described_objects(_held_out())))


def _recall(window: int) -> Task:
    training, _ = split_documents(library_root())
    known = described_objects(document for document in training if document.module in RECALL_MODULES)
    # Modules' own functions and classes: the recipe asks about methods of few classes.
    return GenerationTask("recall", held_out_phrased(one for one in known if one.name.count(".") == 1))


def _signatures(window: int) -> Task:
    return MultipleChoiceTask("signatures", signature_items(described_objects(_held_out())))


def _drawings(window: int) -> Task:
    drawings = [draw("held_out", number) for number in range(NUM_DRAWINGS)]
    return GenerationTask(
        "drawings",
        [Question(one.text, (one.answer,), drawing.image) for drawing in drawings for one in drawing.questions],
        max_tokens=8,
    )


NUM_DRAWINGS = 200
"""About 500 questions"""

BUILT_IN: dict[str, tuple[str, Callable[[int], Task]]] = {
    "source": ("perplexity of the source of modules held out from penstock-mini's training", _source),
    "docstrings": ("what functions, classes and methods of these modules do", _docstrings),
    "recall": ("what well-known functions and classes do, which penstock-mini learned, in words it did not", _recall),
    "signatures": ("which of four signatures a function of the held-out modules has", _signatures),
    "drawings": ("what is to be seen on drawings held out from penstock-mini's training", _drawings),
}
"""By name: what it asks, and how to make it for windows of so many tokens."""

OF_TEXT = tuple(name for name in BUILT_IN if name != "drawings")
"""The tasks that every model can be asked, whether it sees or not"""


def built_in_task(name: str, *, window: int) -> Task:
    """Return the built-in task called ``name``, which must be one of ``BUILT_IN``."""
    return BUILT_IN[name][1](window)
