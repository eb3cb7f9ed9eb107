"""Ends of texts that were cut."""

import json
from datetime import date
from typing import Any

import jsonschema_rs
import pytest

from penstock.text import Tokenizer
from penstock.text.grammar import GrammarCompiler, json_schema_grammar, lark_grammar, regex_grammar
from tests.fakes.tokenizer_files import byte_level_tokenizer

TOKENIZER = Tokenizer.of(byte_level_tokenizer())
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 4},
        "when": {"type": "string", "format": "date"},
        "amounts": {"type": "array", "items": {"type": "number"}, "minItems": 2},
        "kind": {"enum": ["alpha", "beta"]},
        "tree": {"$ref": "#/$defs/tree"},
    },
    "required": ["name", "when", "amounts", "kind", "tree"],
    "additionalProperties": False,
    "$defs": {
        "tree": {
            "type": "object",
            "properties": {"of": {"type": "array", "items": {"$ref": "#/$defs/tree"}}, "is_leaf": {"type": "boolean"}},
            "required": ["of"],
            "additionalProperties": False,
        }
    },
}
WHOLE = {
    "name": 'Zoë "z" \\',
    "when": "2024-02-29",
    "amounts": [-1.5e-3, 20],
    "kind": "beta",
    "tree": {"of": [{"of": [], "is_leaf": True}, {"of": [{"of": []}]}]},
}


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    eos = TOKENIZER.encode("<|end|>", add_special_tokens=False)
    return GrammarCompiler(TOKENIZER, vocab_size=TOKENIZER.vocab_size, eos_token_ids=eos)


def ended(compiler: GrammarCompiler, grammar: str, text: bytes) -> str:
    """Return ``text``, said byte by byte, and the end that was found for it."""
    matcher = compiler.compile(grammar)
    token_ids = [compiler._vocabulary.by_byte[byte] for byte in text]
    assert matcher.try_consume_tokens(token_ids) == len(token_ids)
    ending = compiler.ending(matcher)
    said = b"".join(map(TOKENIZER.token_bytes, [*token_ids, *ending]))
    assert matcher.try_consume_tokens(ending) == len(ending)
    assert matcher.is_stopped() or matcher.is_accepting(), said
    return said.decode()


@pytest.mark.parametrize("indent", [None, 1])
def test_a_json_text_is_ended_wherever_it_is_cut(compiler: GrammarCompiler, indent: int | None) -> None:
    grammar = json_schema_grammar(SCHEMA)
    validator = jsonschema_rs.validator_for(SCHEMA)
    text = json.dumps(WHOLE, ensure_ascii=False, indent=indent).encode()
    for length in range(len(text)):
        answer = json.loads(ended(compiler, grammar, text[:length]))
        validator.validate(answer)
        date.fromisoformat(answer["when"])


@pytest.mark.parametrize(
    ("grammar", "text", "expected"),
    [
        (regex_grammar("ab(cd)*"), "abcdc", "abcdcd"),
        (regex_grammar("ab(cd)*"), "abcd", "abcd"),
        (regex_grammar("[a-z]+Z[0-9]{3}q"), "no", "noZ111q"),
        (regex_grammar("yes|no"), "y", "yes"),
        (lark_grammar('start: "(" item ("," item)* ")"\nitem: /[a-z]{3}/ | start'), "((ab", "((aba))"),
        (json_schema_grammar({}), '{"a": [[[{"b": tr', '{"a": [[[{"b": true}]]]}'),
    ],
)
def test_ends_are_short(compiler: GrammarCompiler, grammar: str, text: str, expected: str) -> None:
    assert ended(compiler, grammar, text.encode()) == expected


def test_an_end_that_is_too_far_is_given_up(compiler: GrammarCompiler) -> None:
    matcher = compiler.compile(regex_grammar("(ab|cd){3000}e"))
    assert compiler.ending(matcher) == []
