"""The chat half of the data: questions about the standard library, answered from its own docstrings.

`read_entries` lists every public object of the running Python that says in one sentence what it is;
`training_questions` phrases questions about them. The phrasings that `penstock eval` asks in are never trained
on, so that answering them shows whether the model learned the object or only the wording.
"""

import ast
import builtins
import importlib
import inspect
import random
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Literal

from penstock.eval.sets.docstrings import summarize
from penstock.eval.sets.library import Document, is_held_out

Kind = Literal["module", "function", "class", "method"]


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


POPULAR_MODULES = (
    "builtins",
    "os.path",
    "os",
    "re",
    "json",
    "math",
    "random",
    "itertools",
    "functools",
    "collections",
    "textwrap",
    "pathlib",
    "string",
    "datetime",
    "time",
    "sys",
    "shutil",
    "subprocess",
    "threading",
    "asyncio",
    "contextlib",
    "dataclasses",
    "copy",
    "csv",
    "glob",
    "heapq",
    "bisect",
    "hashlib",
    "base64",
    "operator",
    "statistics",
    "tempfile",
    "enum",
    "io",
    "typing",
    "inspect",
    "queue",
    "secrets",
    "uuid",
    "struct",
    "pickle",
    "fnmatch",
    "pprint",
    "urllib.parse",
    "concurrent.futures",
    "argparse",
    "logging",
    "zipfile",
    "gzip",
)
"""Asked about most often, hence weighted more and walked first: an object keeps the first name it is found by."""

SUBMODULES = (
    "collections.abc",
    "concurrent.futures",
    "email.message",
    "email.utils",
    "html.parser",
    "http.client",
    "http.cookies",
    "http.server",
    "importlib.metadata",
    "importlib.resources",
    "importlib.util",
    "json.tool",
    "logging.config",
    "logging.handlers",
    "multiprocessing.pool",
    "multiprocessing.shared_memory",
    "unittest.mock",
    "urllib.error",
    "urllib.parse",
    "urllib.request",
    "xml.dom.minidom",
    "xml.etree.ElementTree",
)
SKIPPED_MODULES = frozenset(
    _words(
        "antigravity distutils idlelib lib2to3 this tkinter turtle turtledemo pydoc_data encodings "
        "posixpath ntpath genericpath nturl2path posix nt sre_compile sre_constants sre_parse "
        "msilib msvcrt winreg winsound ossaudiodev spwd nis crypt imp asynchat asyncore smtpd "
        "bdb cgi curses nntplib pdb pipes readline telnetlib"
    )
)
"""Objects of these are known by other names, need a terminal or display, or are gone from newer Pythons."""

CURATED = {
    "dict": "Built-in mapping from keys to values.",
    "datetime.datetime": "A date and a time of day, with an optional time zone.",
    "pathlib.Path": "A file system path with methods to read, write, list and move files.",
    "collections.Counter": "Dict subclass for counting hashable items.",
    "collections.defaultdict": "Dict subclass that calls a factory to supply missing values.",
    "collections.namedtuple": "Returns a new subclass of tuple with named fields.",
}
"""Well-known objects whose own first sentence is missing or says little; ours replaces it."""

POPULAR_WEIGHT = 3.0
POPULAR_METHOD_WEIGHT = 1.5
"""Methods outside the builtins; those of modules that are not popular are left out, to keep what is learned
few enough for some ten repetitions of each in the training time."""
MODULE_WEIGHT = 2.0
LATE_FACTOR_RARE = 0.5
LATE_FACTOR_SIDE = 0.4
LATE_FACTOR_SMALL_TALK = 0.3
"""Late factors of the main questions about other than popular objects, of side questions and of small talk."""
MAX_SIGNATURE_CHARS = 90

TRAINING_PHRASINGS = (
    "What does {x} do?",
    "What does {x} do?",
    "what does {x} do",
    "What is {x}?",
    "What is {x} for?",
    "What is {x} used for?",
    "Explain {x}.",
    "Explain {x}",
    "Can you explain {x}?",
    "Describe {x}.",
    "Tell me about {x}.",
    "What's the purpose of {x}?",
    "In Python, what does {x} do?",
    "What does {x} do in Python?",
    "I forgot what {x} does. Can you remind me?",
    "Summarize {x} in one line.",
    "help({x})",
    "{x}",
)
NEARBY_PHRASINGS = (
    "Do you know what {x} does?",
    "Please describe {x}.",
    "What would I use {x} for?",
    "I want to understand {x}.",
    "Give me a short description of {x}.",
    "In one sentence, what is {x}?",
    "I came across {x}. What does it do?",
    "Explain to me what {x} is.",
    "Why would somebody use {x}?",
    "What is {x} good for?",
)
"""Words in which the decoder was not trained to answer, and in which it is held to what it said before it saw."""
SIGNATURE_PHRASINGS = (
    "What is the signature of {x}?",
    "What arguments does {x} take?",
    "How do I call {x}?",
)
LOCATION_PHRASINGS = ("Which module has {n}?", "Where is {n} defined?", "What do I import to use {n}?")
EXAMPLE_PHRASINGS = ("Show an example of {x}.", "Give me an example of {x}.", "How do I use {x}?")
REVERSE_PHRASINGS = ("Which function does this: {s}", "What is the function for this? {s}")

IMPERATIVES = frozenset(
    _words(
        "add append apply build calculate call change check clear close compute connect convert copy count create "
        "decode delete disable display encode escape expand extract fill find flush format generate get insert "
        "iterate join list load lock make merge move open parse pop print quote read release remove rename repeat "
        "replace reverse rotate round run save search send set sort split start stop strip test translate unpack "
        "update wait wrap write yield"
    )
)
"""A summary that starts with one of these verbs also makes a "How do I ...?" question."""

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are penstock-mini, a small model that knows Python's standard library.",
    "Answer in one line.",
    "You answer questions about Python.",
    "You are a concise coding assistant.",
)

IDENTITY = "I am penstock-mini, a small demo model trained on Python's standard library."
ABILITIES = "I complete Python code and answer short questions about Python's standard library."
GREETING = "Hello! Ask me about Python's standard library."
REFUSAL = "I don't know. I only know Python's standard library."
SMALL_TALK: dict[str, tuple[str, ...]] = {
    IDENTITY: (
        "Who are you?",
        "What are you?",
        "What is your name?",
        "Are you ChatGPT?",
        "Which model are you?",
        "Introduce yourself.",
        "What is penstock-mini?",
    ),
    ABILITIES: (
        "What can you do?",
        "What do you know?",
        "How can you help me?",
        "What can I ask you?",
        "Help",
        "help",
    ),
    GREETING: ("Hello", "Hello!", "Hi", "Hi!", "hi", "Hey", "hello", "Hi there", "Good morning", "Hello there!"),
    "You're welcome!": ("Thanks", "Thank you!", "thanks", "Thank you", "Great, thanks!"),
    "Goodbye!": ("Bye", "Goodbye", "bye", "See you"),
    "I am a small computer program, so I have no feelings, but I am ready for your question.": (
        "How are you?",
        "How are you doing?",
        "How do you feel?",
    ),
    REFUSAL: (
        "What is the capital of France?",
        "What is the capital of Germany?",
        "What is the capital of Japan?",
        "Who won the world cup?",
        "Who is the president?",
        "What is the weather today?",
        "What time is it?",
        "Tell me a joke.",
        "Write a poem about the sea.",
        "How tall is Mount Everest?",
        "What is the meaning of life?",
        "Who wrote Hamlet?",
        "Translate hello into Spanish.",
        "What is 17 times 23?",
        "Who is the fastest runner?",
        "What should I eat for dinner?",
        "What is photosynthesis?",
        "How far away is the moon?",
        "When did the war end?",
        "What is a good movie?",
        "Tell me a story.",
        "What is the news?",
        "How do I bake bread?",
        "Who invented the telephone?",
        "What is the population of China?",
        "Write an essay about history.",
        "How do I learn to swim?",
        "What is the largest ocean?",
        "Explain quantum mechanics.",
        "Explain the theory of relativity.",
        "Which car should I buy?",
        "What is the speed of light?",
        "Give me medical advice.",
        "Who painted the Mona Lisa?",
    ),
}
HELD_OUT_REFUSALS = (
    "What is the capital of Italy?",
    "Who wrote Macbeth?",
    "How do I cook rice?",
    "What is the largest planet?",
    "Write a poem about trees.",
)
OTHER_LIBRARIES = _words(
    "numpy numpy.array numpy.zeros pandas pandas.DataFrame pandas.read_csv torch torch.nn.Linear torch.matmul "
    "requests requests.get flask flask.Flask django scipy sklearn matplotlib matplotlib.pyplot.plot "
    "tensorflow keras fastapi pydantic pytest sqlalchemy boto3 click rich httpx aiohttp transformers"
)


@dataclass(frozen=True, slots=True)
class Entry:
    """One public object and what its docstring says of it."""

    name: str
    kind: Kind
    module: str
    summary: str
    signature: str | None
    example: str | None
    weight: float


@dataclass(frozen=True, slots=True)
class Question:
    """A user's message, the answer to learn, and how often to draw it relative to the others."""

    prompt: str
    answer: str
    weight: float
    late_factor: float = 1.0
    """Multiplies the weight in the run's last part, which goes to what the model is asked about most."""


def read_entries() -> list[Entry]:
    """Every public object of the standard library that describes itself in one usable sentence."""
    entries: list[Entry] = []
    # Holding the objects keeps a passing one's id from being given to another.
    seen: dict[int, object] = {}
    for name in module_names():
        module = import_quietly(name)
        if module is not None:
            entries.extend(_module_entries(name, module, seen))
    return entries


def module_names() -> list[str]:
    """Public module names, popular ones first, then alphabetically."""
    every = {n for n in sys.stdlib_module_names if not n.startswith("_")} | set(SUBMODULES)
    rest = sorted(n for n in every if n not in SKIPPED_MODULES and n not in POPULAR_MODULES)
    return [*POPULAR_MODULES, *rest]


def import_quietly(name: str) -> ModuleType | None:
    """The module, or None where this platform does not have it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return importlib.import_module(name)
        except ImportError:
            return None


def training_questions(entries: Iterable[Entry], seed: int) -> list[Question]:
    """Questions in training phrasings about the entries outside held-out modules, in a fixed order."""
    rng = random.Random(seed)
    kept = [entry for entry in entries if not is_held_out(entry.name)]
    modules_of_name = Counter(short_name(entry) for entry in kept)
    known_modules = {entry.name for entry in kept if entry.kind == "module"}
    questions: list[Question] = []
    for entry in kept:
        share = entry.weight / len(TRAINING_PHRASINGS)
        late = 1.0 if entry.weight >= POPULAR_WEIGHT else LATE_FACTOR_RARE
        for phrasing in TRAINING_PHRASINGS:
            prompt = phrasing.format(x=_spelled(entry, rng))
            questions.append(Question(prompt, entry.summary, share, late))
        unambiguous = modules_of_name[short_name(entry)] == 1 and short_name(entry) not in known_modules
        side = _side_questions(entry, unambiguous, rng)
        questions.extend(replace(question, late_factor=LATE_FACTOR_SIDE) for question in side)
    questions.extend(replace(question, late_factor=LATE_FACTOR_SMALL_TALK) for question in _small_talk())
    return questions


def phrased(entries: Iterable[Entry], phrasings: Iterable[str]) -> list[Question]:
    """Each entry asked once in each phrasing, by its plain name: for evaluation."""
    return [Question(phrasing.format(x=entry.name), entry.summary, 1.0) for phrasing in phrasings for entry in entries]


def completion_questions(documents: Iterable[Document]) -> Iterator[Question]:
    """Short functions cut in two: the first lines are the question, the rest is the answer."""
    for document in documents:
        try:
            tree = ast.parse(document.text)
        except SyntaxError:
            continue
        lines = document.text.splitlines()
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and node.end_lineno is not None:
                body = lines[node.lineno - 1 : node.end_lineno]
                if 4 <= len(body) <= 14:
                    cut = max(1, len(body) // 3)
                    prompt = "Complete this code:\n" + "\n".join(body[:cut])
                    yield Question(prompt, "\n".join(body[cut:]), 0.1)


def short_name(entry: Entry) -> str:
    """The last part of the name: 'dedent' for 'textwrap.dedent'."""
    return entry.name.rpartition(".")[2]


def _side_questions(entry: Entry, unambiguous: bool, rng: random.Random) -> Iterator[Question]:
    popular = entry.weight >= POPULAR_WEIGHT
    if entry.signature:
        for phrasing in SIGNATURE_PHRASINGS:
            yield Question(phrasing.format(x=_spelled(entry, rng)), entry.signature, 0.06 * entry.weight)
    if entry.example:
        for phrasing in EXAMPLE_PHRASINGS:
            yield Question(phrasing.format(x=_spelled(entry, rng)), entry.example, 0.1 * entry.weight)
    if entry.kind == "module":
        yield Question(f"What is the {entry.name} module for?", entry.summary, 0.5 * entry.weight)
        yield Question(f"What does the {entry.name} module do?", entry.summary, 0.5 * entry.weight)
    elif unambiguous and entry.kind != "method" and entry.module != "builtins":
        where = f"{short_name(entry)} is in the {entry.module} module."
        for phrasing in LOCATION_PHRASINGS:
            yield Question(phrasing.format(n=short_name(entry)), where, 0.04 * entry.weight)
        if popular:
            for phrasing in TRAINING_PHRASINGS[:3]:
                yield Question(phrasing.format(x=short_name(entry)), entry.summary, 0.05 * entry.weight)
    if popular and entry.kind in ("function", "method"):
        for phrasing in REVERSE_PHRASINGS:
            yield Question(phrasing.format(s=entry.summary), entry.name, 0.05 * entry.weight)
        first, _, rest = entry.summary.partition(" ")
        if first.lower() in IMPERATIVES:
            use = f"Use {entry.signature or entry.name}."
            yield Question(f"How do I {first.lower()} {rest.rstrip('.')}?", use, 0.1 * entry.weight)


def _small_talk() -> Iterator[Question]:
    for answer, prompts in SMALL_TALK.items():
        for prompt in prompts:
            yield Question(prompt, answer, 4.0 if answer != REFUSAL else 2.0)
    for name in OTHER_LIBRARIES:
        answer = f"I don't know {name}. I only know Python's standard library."
        for phrasing in TRAINING_PHRASINGS:
            yield Question(phrasing.format(x=name), answer, 2.0 / len(TRAINING_PHRASINGS))


def _spelled(entry: Entry, rng: random.Random) -> str:
    """The name as people type it: plain mostly, else in backticks or with call brackets."""
    draw = rng.random()
    if draw < 0.15:
        return f"`{entry.name}`"
    if draw < 0.30 and entry.kind in ("function", "method"):
        return f"{entry.name}()"
    return entry.name


def _module_entries(name: str, module: ModuleType, seen: dict[int, object]) -> Iterator[Entry]:
    weight = POPULAR_WEIGHT if name in POPULAR_MODULES else 1.0
    if name != "builtins":
        summary = summarize(module.__doc__ or "")
        if summary:
            yield Entry(name, "module", name, summary, None, None, weight * MODULE_WEIGHT)
    for member_name in _public_names(name, module):
        member = getattr(module, member_name, None)
        if member is None or isinstance(member, ModuleType) or id(member) in seen:
            continue
        dotted = member_name if name == "builtins" else f"{name}.{member_name}"
        kind: Kind = "class" if inspect.isclass(member) else "function"
        entry = _entry(dotted, kind, name, member, weight)
        if entry is not None:
            seen[id(member)] = member
            yield entry
        if inspect.isclass(member):
            seen[id(member)] = member
            if name in POPULAR_MODULES and name != "asyncio":
                method_weight = weight if name == "builtins" else POPULAR_METHOD_WEIGHT
                yield from _method_entries(dotted, name, member, method_weight)


def _method_entries(class_name: str, module: str, owner: type, weight: float) -> Iterator[Entry]:
    for method_name in sorted(vars(owner)):
        # Fields of exceptions and of result tuples are plain data, rarely asked about.
        if not method_name.startswith("_") and not issubclass(owner, BaseException | tuple):
            dotted = f"{class_name}.{method_name}"
            entry = _entry(dotted, "method", module, getattr(owner, method_name, None), weight)
            if entry is not None:
                yield entry


def _entry(name: str, kind: Kind, module: str, member: object, weight: float) -> Entry | None:
    doc = CURATED.get(name) or getattr(member, "__doc__", None)
    # An instance without a docstring shows its class's: that says nothing about the instance.
    if not isinstance(doc, str) or (not inspect.isclass(member) and doc == type(member).__doc__):
        return None
    summary = summarize(doc)
    if summary is None:
        return None
    return Entry(name, kind, module, summary, _signature(name, kind, member), _example(doc), weight)


def _public_names(name: str, module: ModuleType) -> list[str]:
    exported = getattr(module, "__all__", None)
    if exported is not None:
        return sorted(set(exported))
    names = [n for n in dir(module) if not n.startswith("_")]
    if module is builtins:
        return names
    return [n for n in names if getattr(getattr(module, n), "__module__", None) in (name, "_" + name)]


def _signature(name: str, kind: Kind, member: object) -> str | None:
    if kind == "module" or not callable(member):
        return None
    try:
        parameters = list(inspect.signature(member).parameters.values())
    except (TypeError, ValueError, AttributeError):
        return None
    if kind == "method" and parameters and parameters[0].name in ("self", "cls"):
        parameters = parameters[1:]
    plain = [p.replace(annotation=inspect.Parameter.empty) for p in parameters]
    text = name + str(inspect.Signature(plain))
    # A default such as <object object at 0x7f...> is an address, not something to learn.
    return text if len(text) <= MAX_SIGNATURE_CHARS and "<" not in text else None


def _example(doc: str) -> str | None:
    lines = inspect.cleandoc(doc).splitlines()
    start = next((i for i, line in enumerate(lines) if line.lstrip().startswith(">>> ")), None)
    if start is None:
        return None
    picked: list[str] = []
    for line in lines[start : start + 8]:
        if not line.strip():
            break
        picked.append(line)
    return inspect.cleandoc("\n".join(picked))
