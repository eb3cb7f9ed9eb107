"""Questions about the standard library, answered from its own docstrings, read from source without importing it."""

import ast
import copy
import inspect
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from penstock.eval.sets.library import Document
from penstock.eval.tasks.generation import Question

_SIGNATURE_ONLY = re.compile(r"^[\w.]+\([^)]*\)(\s*-{1,2}>\s*[\w.\[\]]+(\s[\w.]+)?)?:?$")
_CALL_PREFIX = re.compile(r"^[\w.]+\([^)]*\)\s*(?:-{1,2}>|--|-|:|=)\s*(?P<rest>.+)$")
_SENTENCE_END = re.compile(r"(?<=[.!?])(?<!e\.g\.)(?<!i\.e\.)(?<!etc\.)(?<!vs\.)\s+(?=[A-Z`\"'(*])|\s+(?=>>> )")

HELD_OUT_PHRASINGS = (
    "Could you tell me what {x} does?",
    "Please explain what {x} is for.",
    "How would you describe {x} to a beginner?",
    "I saw {x} in some code, what is it?",
)
"""In words that penstock-mini was never asked in."""

RECALL_MODULES = frozenset(
    {
        "bisect",
        "calendar",
        "contextlib",
        "copy",
        "fnmatch",
        "functools",
        "glob",
        "heapq",
        "inspect",
        "json",
        "random",
        "secrets",
        "shutil",
        "statistics",
        "string",
        "subprocess",
        "tempfile",
        "textwrap",
        "threading",
        "uuid",
    }
)
"""Well-known modules in Python source that penstock-mini was asked about in training, in other words than these."""

MIN_SUMMARY_CHARS = 10
MAX_SUMMARY_CHARS = 200
MAX_PARAMETERS_CHARS = 90


@dataclass(frozen=True, slots=True)
class DescribedObject:
    """A public function, class or method, what its docstring says of it first, and what it is called with."""

    name: str
    """Dotted, module included"""
    summary: str
    parameters: str | None
    """As they are written, without annotations and ``self``: ``text, width=70``; None for a class"""


def described_objects(documents: Iterable[Document]) -> list[DescribedObject]:
    """Return what ``documents`` define and describe, in their order. A file that this Python cannot parse has none."""
    found: list[DescribedObject] = []
    for document in documents:
        module = document.path.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
        if any(part.startswith("_") for part in module.split(".")):
            continue
        try:
            tree = ast.parse(document.text)
        except SyntaxError:
            continue
        found.extend(_described(module, tree.body, in_class=False))
    return found


def held_out_phrased(objects: Iterable[DescribedObject]) -> list[Question]:
    """Return one question about each object, the phrasings in turn; the summary is the answer."""
    return [
        Question(HELD_OUT_PHRASINGS[i % len(HELD_OUT_PHRASINGS)].format(x=one.name), (one.summary,))
        for i, one in enumerate(objects)
    ]


def _described(prefix: str, body: list[ast.stmt], *, in_class: bool) -> Iterator[DescribedObject]:
    for node in body:
        if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
            continue
        name, is_class = f"{prefix}.{node.name}", isinstance(node, ast.ClassDef)
        summary = summarize(ast.get_docstring(node) or "")
        if summary is not None:
            parameters = None if isinstance(node, ast.ClassDef) else _parameters(node.args, is_method=in_class)
            yield DescribedObject(name, summary, parameters)
        if is_class and not in_class:
            yield from _described(name, node.body, in_class=True)


def _parameters(arguments: ast.arguments, *, is_method: bool) -> str | None:
    plain = copy.deepcopy(arguments)
    named = plain.posonlyargs or plain.args
    if is_method and named and named[0].arg in ("self", "cls"):
        named.pop(0)
    for argument in ast.walk(plain):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    text = ast.unparse(plain)
    return text if len(text) <= MAX_PARAMETERS_CHARS else None


def summarize(doc: str) -> str | None:
    """Return the first sentence of a docstring on one line, or None if there is no usable one."""
    for paragraph in inspect.cleandoc(doc).split("\n\n"):
        lines = [line.strip() for line in paragraph.splitlines()]
        while lines and _SIGNATURE_ONLY.match(lines[0]):
            lines.pop(0)
        text = " ".join(" ".join(lines).split())
        if not text:
            continue
        called = _CALL_PREFIX.match(text)
        if called:
            text = _after_arrow(called.group("rest"))
        sentence = _SENTENCE_END.split(text, maxsplit=1)[0].rstrip(" :;,")
        if len(sentence) > MAX_SUMMARY_CHARS:
            # The next sentence may start with a parameter's name, in lower case.
            sentence = sentence.partition(". ")[0]
        if not MIN_SUMMARY_CHARS <= len(sentence) <= MAX_SUMMARY_CHARS or " " not in sentence:
            return None
        sentence = sentence[0].upper() + sentence[1:]
        return sentence if sentence[-1] in ".!?" else sentence + "."
    return None


def _after_arrow(rest: str) -> str:
    """'v, remove the key' -> 'remove the key'; 'a view on the items' -> 'Return a view on the items'."""
    rest = re.sub(r"^None[.,;]?\s+", "", rest)
    result, comma, action = rest.partition(", ")
    if comma and len(result.split()) <= 3:
        return action
    separate = re.match(r"^[\w ]{1,20}\.\s+(?P<action>[A-Z].*)", rest)
    if separate:
        return separate["action"]
    dashed = re.match(r"^[\w ,()\[\]]{1,40}\s--?\s(?P<action>.*)", rest)
    if dashed:
        return dashed["action"]
    return rest if rest[:1].isupper() else "Return " + rest
