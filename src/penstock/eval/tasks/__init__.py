"""What a model can be asked: each kind of task beside the others."""

from penstock.eval.tasks.base import OnItem, Task
from penstock.eval.tasks.generation import GenerationTask, Question
from penstock.eval.tasks.multiple_choice import ChoiceItem, MultipleChoiceTask
from penstock.eval.tasks.perplexity import PerplexityTask

__all__ = ["ChoiceItem", "GenerationTask", "MultipleChoiceTask", "OnItem", "PerplexityTask", "Question", "Task"]
