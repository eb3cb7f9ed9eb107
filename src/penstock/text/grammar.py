"""What a text must look like, as a grammar, and the matchers that hold a model to it.

A grammar travels as llguidance's own serialized form (github.com/guidance-ai/llguidance, docs/syntax.md): the functions
here write it, ``GrammarCompiler`` reads it.
"""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from penstock.errors import InvalidRequest, MissingExtra
from penstock.text.ending import find_ending
from penstock.text.tokenizer import Tokenizer
from penstock.threads import WorkThread

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

_WHITESPACE = r" |\r?\n[ \t]{0,40}"
"""Between the parts of a JSON text: a space, or a new line and its indentation; never all there is in an answer."""
_SEARCH_S = 0.5
"""For compiling the parts of a schema to find the one at fault. A part that holds it is found in any case."""
_MOST_MESSAGE_CHARS = 600


def schema_with_options(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``schema`` with what llguidance is to know about JSON texts."""
    return {**schema, "x-guidance": {"whitespace_pattern": _WHITESPACE}}


def json_schema_grammar(schema: Mapping[str, Any]) -> str:
    """Return the grammar of the JSON texts that ``schema`` describes."""
    return _serialized({"json_schema": schema_with_options(schema)})


def regex_grammar(pattern: str) -> str:
    """Return the grammar of the texts that ``pattern`` matches as a whole."""
    from_regex: str = _matcher_type().grammar_from_regex(pattern)
    return from_regex


def choice_grammar(choices: Sequence[str]) -> str:
    """Return the grammar that is any one of ``choices``."""
    return lark_grammar("start: " + " | ".join(map(json.dumps, choices)))


def lark_grammar(text: str) -> str:
    """Return the grammar written in ``text``, in Lark's syntax as llguidance reads it."""
    return _serialized({"lark_grammar": text})


def lark_or_gbnf_grammar(text: str) -> str:
    """Return the grammar written in ``text``, in Lark's syntax or in llama.cpp's GBNF.

    Raises ``InvalidRequest`` for text that is neither.
    """
    _matcher_type()
    from llguidance.gbnf_to_lark import any_to_lark

    try:
        return lark_grammar(any_to_lark(text))
    except Exception as error:  # the converter raises whatever its own parser meets
        raise InvalidRequest(f"the grammar is neither Lark nor GBNF: {error}") from error


def with_content(rules: str, content: str | None) -> str:
    """Return the grammar written in ``rules``, in Lark's syntax, whose ``@content`` is the grammar ``content``."""
    named = [] if content is None else [{**json.loads(content)["grammars"][0], "name": "content"}]
    return json.dumps({"grammars": [{"lark_grammar": rules}, *named]})


def _serialized(grammar: Mapping[str, Any]) -> str:
    return json.dumps({"grammars": [grammar]})


def _matcher_type() -> "type[LLMatcher]":
    try:
        from llguidance import LLMatcher
    except ImportError as error:
        raise MissingExtra(
            f"structured output needs llguidance ({error}); install it with: pip install 'penstock[engine]'"
        ) from error
    return LLMatcher


def compile_thread() -> WorkThread:
    """Return a thread for a ``GrammarCompiler``.

    Rules that refer to one another are followed recursively, at up to 8 KiB of stack each. A grammar of 128 KiB cannot
    name enough of them to use this stack up; the ordinary 8 MiB ended the process at 2,000.
    """
    return WorkThread("penstock-grammar", stack_bytes=256 * 1024 * 1024)


class GrammarCompiler:
    """Makes matchers over one vocabulary. All of it blocks, without the interpreter lock: use a ``compile_thread``.

    The first use indexes the vocabulary, which takes up to a second.
    """

    def __init__(self, tokenizer: Tokenizer, *, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        """``vocab_size`` is the model's, which may be larger than the tokenizer's."""
        self._vocabulary = _Vocabulary(tokenizer, vocab_size, eos_token_ids)

    def index(self) -> None:
        """Do now what the first use would do."""
        assert self._vocabulary.indexed is not None

    def compile(self, grammar: str) -> "LLMatcher":
        """Return a matcher at the beginning of ``grammar``.

        Raises ``InvalidRequest``, in the compiler's own words, for a grammar that cannot be compiled or that nothing
        matches.
        """
        matcher = self._matcher(grammar)
        if not matcher.is_error():
            # A grammar may be well formed and allow no first token: that shows here, not in the middle of a batch.
            matcher.compute_bitmask()
        if matcher.is_error():
            raise InvalidRequest(_plain(matcher.get_error()))
        return matcher

    def ending(self, matcher: "LLMatcher") -> list[int]:
        """Return tokens that bring a text at ``matcher`` to an end of its grammar; see ``find_ending``."""
        return find_ending(matcher, self._vocabulary.by_byte)

    def is_wrong(self, schema: Mapping[str, Any]) -> bool:
        """Whether ``schema`` cannot be compiled by itself."""
        return self._matcher(json_schema_grammar(schema)).is_error()

    def locate(self, schema: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the path to the smallest part of ``schema`` that is wrong in the way the whole is."""
        shared = {name: schema[name] for name in ("$defs", "definitions") if name in schema}

        def error_of(part: Mapping[str, Any]) -> str:
            return self._matcher(json_schema_grammar({**shared, **part})).get_error()

        path: tuple[str, ...] = ()
        part, whole = schema, error_of(schema)
        deadline_s = time.monotonic() + _SEARCH_S
        found: bool = bool(whole)
        while found:
            found = False
            for place, child in _parts(part):
                if time.monotonic() > deadline_s:
                    return path
                if error_of(child) == whole:
                    path, part, found = path + place, child, True
                    break
        return path

    def _matcher(self, grammar: str) -> "LLMatcher":
        from llguidance import LLParserLimits

        matcher = _matcher_type()
        limits = LLParserLimits(verbose_errors=False)
        return matcher(self._vocabulary.indexed, grammar, log_level=0, limits=limits)


class _Vocabulary:
    """A tokenizer as llguidance wants to see one."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        # A model that has no end of sequence gets one past its vocabulary, which it can never say.
        self._eos_token_ids = list(eos_token_ids) or [vocab_size]

    @cached_property
    def indexed(self) -> "LLTokenizer":
        """The prefix tree of all tokens."""
        from llguidance import LLTokenizer
        from llguidance._tokenizer import TokenizerWrapper

        size = max(self._vocab_size, *(token_id + 1 for token_id in self._eos_token_ids))
        self.eos_token_id = self._eos_token_ids[0]
        self.bos_token_id = self._tokenizer.bos_token_id
        self.tokens = [self._tokenizer.token_bytes(token_id) for token_id in range(size)]
        self.special_token_ids = sorted({*self._tokenizer.special_token_ids, *self._eos_token_ids})
        return LLTokenizer(TokenizerWrapper(self), n_vocab=size, eos_token=self._eos_token_ids)

    def __call__(self, text: bytes | str) -> list[int]:
        """Return tokens whose bytes are exactly those of ``text``, as the tokenizer would choose them within a text.

        What a grammar forces is said in these tokens.
        """
        text = text if isinstance(text, str) else text.decode()
        data = text.encode()
        for before in ("", _CONTROL):
            token_ids = self._tokenizer.encode(before + text, add_special_tokens=False)
            first, length = len(token_ids), 0
            while first and length < len(data):
                first -= 1
                length += len(self._tokenizer.token_bytes(token_ids[first]))
            if b"".join(map(self._tokenizer.token_bytes, token_ids[first:])) == data:
                return token_ids[first:]
        return self._longest_first(data)

    def _longest_first(self, data: bytes) -> list[int]:
        """Return tokens that are exactly ``data``, none if there are none; where the tokenizer reads something else."""
        token_ids, first = [], 0
        while first < len(data):
            for last in range(min(len(data), first + _LONGEST_TOKEN_BYTES), first, -1):
                token_id = self._by_bytes.get(data[first:last])
                if token_id is not None:
                    break
            else:
                return []
            token_ids.append(token_id)
            first = last
        return token_ids

    @cached_property
    def by_byte(self) -> dict[int, int]:
        """The tokens of one byte."""
        return {data[0]: token_id for data, token_id in self._by_bytes.items() if len(data) == 1}

    @cached_property
    def _by_bytes(self) -> dict[bytes, int]:
        special = set(self.special_token_ids)
        return {data: token_id for token_id, data in enumerate(self.tokens) if data and token_id not in special}


_LONGEST_TOKEN_BYTES = 32
_CONTROL = "\x02"
"""Put before a text: SentencePiece adds a space to the front, which then is not the text's own."""


def _parts(schema: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], Mapping[str, Any]]]:
    """Yield the schemas directly inside ``schema`` and where they are."""
    for name in ("properties", "patternProperties", "$defs", "definitions"):
        for key, child in _items(schema.get(name)):
            yield (name, key), child
    for name in ("items", "additionalProperties"):
        one = schema.get(name)
        if isinstance(one, dict):
            yield (name,), one
    for name in ("prefixItems", "anyOf", "allOf", "oneOf"):
        for key, child in _items(schema.get(name)):
            yield (name, key), child


def _items(value: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in pairs:
        if isinstance(child, dict):
            yield str(key), child


def _plain(message: str) -> str:
    """Return the compiler's complaint without its note about settings that are not the caller's."""
    message = message.replace("\n<non-verbose/>", "").strip()
    if message in ("NoExtension", "NoExtensionBias"):
        return "there is no text that it matches"
    return message if len(message) <= _MOST_MESSAGE_CHARS else message[:_MOST_MESSAGE_CHARS] + "..."
