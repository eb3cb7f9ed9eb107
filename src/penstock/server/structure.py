"""What a client wants an answer to look like, as a grammar that is known to compile."""

import asyncio
import json
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from penstock.errors import InvalidRequest, Overloaded
from penstock.protocol import ModelInfo
from penstock.server.config import ServerConfig
from penstock.server.schemas import ChatCompletionRequest, CompletionRequest, JSONObjectFormat, JSONSchemaFormat
from penstock.text import Tokenizer
from penstock.text import grammar as grammars
from penstock.text.grammar import GrammarCompiler

_MOST_GIVEN_UP = 2
"""Compilations that took too long and may be left to end by themselves while others go on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Structure:
    """What an answer must match and where the request says so."""

    param: str
    write: Callable[[], str]
    """Returns the grammar; raises ``InvalidRequest`` if it is not one."""
    schemas: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """JSON schemas in it, by where the request says them"""
    is_required: bool = True
    """Whether an answer without it would be wrong; otherwise it is followed where it can be."""


def structure_of(body: CompletionRequest | ChatCompletionRequest) -> Structure | None:
    """Return what ``body`` asks answers to match, if it does. Raises ``InvalidRequest`` naming the parameter."""
    wanted, response_format = body.structured_outputs, body.response_format
    if wanted is None:
        match response_format:
            case JSONObjectFormat():
                return _of_schema({"type": "object"}, "response_format")
            case JSONSchemaFormat(json_schema=named):
                return _of_schema(named.schema_, "response_format.json_schema.schema")
        return None
    if isinstance(response_format, JSONObjectFormat | JSONSchemaFormat):
        raise InvalidRequest(
            "response_format and structured_outputs both say what the answer must look like; leave one out",
            param="structured_outputs",
        )
    if wanted.json_ is not None:
        return _of_schema(_schema(wanted.json_), "structured_outputs.json")
    if wanted.regex is not None:
        return Structure(param="structured_outputs.regex", write=partial(grammars.regex_grammar, wanted.regex))
    if wanted.choice is not None:
        return Structure(param="structured_outputs.choice", write=partial(grammars.choice_grammar, wanted.choice))
    if wanted.grammar is not None:
        write = partial(grammars.lark_or_gbnf_grammar, wanted.grammar)
        return Structure(param="structured_outputs.grammar", write=write)
    return _of_schema({"type": "object"}, "structured_outputs.json_object")


def _schema(given: str | dict[str, Any]) -> dict[str, Any]:
    if isinstance(given, dict):
        return given
    try:
        schema = json.loads(given)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"the schema is not valid JSON: {error}", param="structured_outputs.json") from error
    if not isinstance(schema, dict):
        raise InvalidRequest("the schema must be a JSON object", param="structured_outputs.json")
    return schema


def _of_schema(schema: dict[str, Any], param: str) -> Structure:
    return Structure(param=param, write=partial(grammars.json_schema_grammar, schema), schemas={param: schema})


class GrammarChecker:
    """Finds out whether grammars compile, off the event loop, bounded in size and time."""

    def __init__(self, tokenizer: Tokenizer, model: Callable[[], ModelInfo], config: ServerConfig) -> None:
        """``model`` is asked when the first grammar comes."""
        self._tokenizer = tokenizer
        self._model = model
        self._config = config
        self._compiler: GrammarCompiler | None = None
        self._index: Future[None] = Future()
        self._thread = grammars.compile_thread()
        self._given_up: list[Future[str]] = []
        """Of these, what is not done still has its thread."""

    async def check(self, structure: Structure) -> str | None:
        """Return the grammar, which the engine will be able to compile; None if it is none and is not required either.

        Raises ``InvalidRequest`` that says where and why it cannot be compiled, or that it is too large or complex, and
        ``Overloaded`` if others' are being compiled all the time.
        """
        compiler = await self._indexed_compiler()
        checked = self._thread.submit(self._check, structure, compiler)
        try:
            return await asyncio.wait_for(asyncio.wrap_future(checked), self._config.grammar_timeout_s)
        except InvalidRequest:
            if structure.is_required:
                raise
            return None
        except TimeoutError as error:
            if checked.cancelled():
                raise Overloaded(
                    "the grammars of other requests are being compiled; retry in a moment", retry_after_s=1.0
                ) from error
            self._give_up(checked)
            if not structure.is_required:
                return None
            raise InvalidRequest(
                f"{structure.param} takes longer than {self._config.grammar_timeout_s:g} s to compile; simplify it",
                param=structure.param,
            ) from error

    async def _indexed_compiler(self) -> GrammarCompiler:
        """Return the compiler once it has indexed the vocabulary, which no grammar's time is spent on."""
        if self._compiler is None:
            model = self._model()
            self._compiler = GrammarCompiler(
                self._tokenizer, vocab_size=model.vocab_size, eos_token_ids=model.eos_token_ids
            )
            self._index = self._thread.submit(self._compiler.index)
        if not self._index.done():
            await asyncio.shield(asyncio.wrap_future(self._index))
        return self._compiler

    def _check(self, structure: Structure, compiler: GrammarCompiler) -> str:
        param, most = structure.param, self._config.max_grammar_chars
        try:
            grammar = structure.write()
            if len(grammar) > most:
                raise InvalidRequest(f"it is {len(grammar)} characters long and this server takes at most {most}")
            compiler.compile(grammar)
        except InvalidRequest as error:
            for place, schema in structure.schemas.items():
                if compiler.is_wrong(schema):
                    param = ".".join((place, *compiler.locate(schema)))
                    break
            raise InvalidRequest(f"{param} cannot be compiled: {error.message}", param=param) from error
        return grammar

    def _give_up(self, checked: "Future[str]") -> None:
        """Have others go on, on a new thread, unless too many are at work already."""
        self._given_up = [one for one in (*self._given_up, checked) if not one.done()]
        if len(self._given_up) <= _MOST_GIVEN_UP:
            self._thread = grammars.compile_thread()
