"""Grammars as they are written and compiled, by friends and by strangers."""

import contextlib
import json
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest
from tokenizers import Tokenizer as Backend

from penstock.errors import InvalidRequest
from penstock.text import Tokenizer
from penstock.text.grammar import (
    GrammarCompiler,
    choice_grammar,
    compile_thread,
    json_schema_grammar,
    lark_grammar,
    lark_or_gbnf_grammar,
    regex_grammar,
    with_content,
)
from tests.fakes.tokenizer_files import byte_fallback_tokenizer, byte_level_tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher

TOKENIZER = Tokenizer.of(byte_level_tokenizer())
EOS = TOKENIZER.encode("<|end|>", add_special_tokens=False)[0]
MOST_CHARS = 131_072
"""As the server's setting has it"""


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    return GrammarCompiler(TOKENIZER, vocab_size=TOKENIZER.vocab_size + 7, eos_token_ids=(EOS,))


def accepts(matcher: "LLMatcher", text: str, tokenizer: Tokenizer = TOKENIZER) -> bool:
    """Whether a whole text matches, token by token."""
    tokens = tokenizer.encode(text, add_special_tokens=False)
    if matcher.try_consume_tokens(tokens) < len(tokens):
        return False
    return matcher.is_accepting()


@pytest.mark.parametrize(
    ("grammar", "good", "bad"),
    [
        (regex_grammar("a+é?"), ["a", "aaé"], ["", "é", "aéa"]),
        (choice_grammar(["yes", 'n"o\n']), ["yes", 'n"o\n'], ["ye", "yesyes", "n"]),
        (lark_grammar('start: "(" start ")" | "x"'), ["x", "((x))"], ["(x", "()"]),
        (lark_or_gbnf_grammar('root ::= "a" b*\nb ::= [0-9]'), ["a", "a12"], ["b", "aa"]),
        (json_schema_grammar({"type": "array", "items": {"type": "integer"}}), ["[]", "[1, 2]"], ["[1", "[1,]", "{}"]),
        (json_schema_grammar({"enum": ["x", None]}), ['"x"', "null"], ["x"]),
        (with_content('start: "<" @content ">"', regex_grammar("a+")), ["<a>", "<aa>"], ["a", "<>"]),
    ],
)
def test_what_is_written_is_what_matches(
    grammar: str, good: list[str], bad: list[str], compiler: GrammarCompiler
) -> None:
    for text in good:
        assert accepts(compiler.compile(grammar), text), text
    for text in bad:
        assert not accepts(compiler.compile(grammar), text), text


def test_indentation_is_allowed_and_has_an_end(compiler: GrammarCompiler) -> None:
    value = {"a": [1, {"b": None}], "c": "d"}
    grammar = json_schema_grammar({"type": "object"})
    for indent in (None, 2, 4, "\t"):
        assert accepts(compiler.compile(grammar), json.dumps(value, indent=indent))
    assert accepts(compiler.compile(grammar), json.dumps(value, separators=(",", ":")))
    assert not accepts(compiler.compile(grammar), '{\n\n"a": 1}')
    assert not accepts(compiler.compile(grammar), "{" + " " * 50 + '"a": 1}')


def allowed(matcher: "LLMatcher") -> set[int]:
    bits = matcher.compute_bitmask()
    return {token_id for token_id in range(len(bits) * 8) if bits[token_id // 8] >> token_id % 8 & 1}


def test_masks_know_ends_special_tokens_and_the_padded_vocabulary(compiler: GrammarCompiler) -> None:
    matcher = compiler.compile(regex_grammar("(?s:.*)"))
    assert EOS in allowed(matcher)
    assert not allowed(matcher) & (TOKENIZER.special_token_ids - {EOS}), (
        "a special token is not the text it is written as"
    )
    assert max(allowed(matcher)) < TOKENIZER.vocab_size
    matcher = compiler.compile(lark_grammar("start: <|im_start|> /a/"))
    assert {TOKENIZER.vocab_entry(token_id) for token_id in allowed(matcher)} == {"<|im_start|>"}
    matcher = compiler.compile(regex_grammar("a"))
    matcher.consume_token(TOKENIZER.encode("a", add_special_tokens=False)[0])
    assert allowed(matcher) == {EOS}


def test_a_model_without_an_end_has_a_grammar_without_one() -> None:
    compiler = GrammarCompiler(TOKENIZER, vocab_size=TOKENIZER.vocab_size, eos_token_ids=())
    matcher = compiler.compile(regex_grammar("ab?"))
    matcher.consume_token(TOKENIZER.encode("a", add_special_tokens=False)[0])
    assert allowed(matcher) == {*TOKENIZER.encode("b", add_special_tokens=False), TOKENIZER.vocab_size}


def test_vocabularies_of_pieces_and_bytes() -> None:
    tokenizer = Tokenizer.of(byte_fallback_tokenizer())
    compiler = GrammarCompiler(tokenizer, vocab_size=tokenizer.vocab_size, eos_token_ids=(2,))
    assert accepts(compiler.compile(regex_grammar(" hi (你好|z)+")), "hi 你好z你好", tokenizer)


@pytest.mark.parametrize("backend", [byte_level_tokenizer(), byte_fallback_tokenizer()], ids=["letters", "pieces"])
@pytest.mark.parametrize(
    "text", ["hi hi, hello world", " hi 你好", '<tool_call>\n{"name": 👍}', "\x02\x02 ", "▁ ▁", "é"]
)
def test_a_text_that_is_forced_can_be_said(backend: Backend, text: str) -> None:
    tokenizer = Tokenizer.of(backend)
    compiler = GrammarCompiler(tokenizer, vocab_size=tokenizer.vocab_size, eos_token_ids=(2,))
    matcher = compiler.compile(choice_grammar([text]))
    said = b""
    while not matcher.is_stopped():
        token_id = min(allowed(matcher))
        assert matcher.consume_token(token_id), matcher.get_error()
        said += tokenizer.token_bytes(token_id)
    assert said.decode() == text


@pytest.mark.parametrize(
    ("schema", "path"),
    [
        ({"type": "wrong"}, ()),
        ({"properties": {"a": {"items": {"type": "wrong"}}}}, ("properties", "a", "items")),
        ({"anyOf": [{"type": "null"}, {"not": {}}]}, ("anyOf", "1")),
        ({"$defs": {"x": {"oneOf": [{}, {}]}}, "properties": {"a": {"$ref": "#/$defs/x"}}}, ("properties", "a")),
        ({"prefixItems": [{"pattern": "("}]}, ("prefixItems", "0")),
        ({"additionalProperties": {"format": "wrong"}}, ("additionalProperties",)),
        ({"properties": {"a": {"$ref": "#/nowhere"}}}, ("properties", "a")),
        ({"type": "object", "required": ["a"], "properties": {"a": False}}, ()),
    ],
)
def test_the_part_at_fault_is_found(schema: dict[str, Any], path: tuple[str, ...], compiler: GrammarCompiler) -> None:
    with pytest.raises(InvalidRequest):
        compiler.compile(json_schema_grammar(schema))
    assert compiler.locate(schema) == path


def chain(num: int, link: Callable[[str], Any], end: Any) -> str:
    definitions = {f"{i:x}": link(f"#/$defs/{i + 1:x}") for i in range(num)} | {f"{num:x}": end}
    return json_schema_grammar({"$defs": definitions, "$ref": "#/$defs/0"})


def deep_grammars() -> Iterator[Any]:
    """Grammars of the largest size that nest as deep as can be written in it."""
    yield pytest.param(chain(3500, lambda ref: {"$ref": ref}, {"type": "null"}), id="references")
    yield pytest.param(chain(2600, lambda ref: {"items": {"$ref": ref}}, {"type": "null"}), id="arrays")
    yield pytest.param(chain(2200, lambda ref: {"allOf": [{"$ref": ref}, {}]}, {"type": "null"}), id="allOf")
    yield pytest.param(chain(2200, lambda ref: {"anyOf": [{"$ref": ref}, {}]}, {"type": "null"}), id="anyOf")
    rules = [f"r{i:x}: r{i + 1:x}\n" for i in range(8000)]
    yield pytest.param(lark_grammar("start: r0\n" + "".join(rules) + 'r1f40: "a"'), id="rules")
    yield pytest.param(lark_grammar("start: R0\n" + "".join(rules).upper() + 'R1F40: "a"'), id="terminals")
    yield pytest.param(regex_grammar("(" * 60_000 + "a" + ")" * 60_000), id="groups")
    yield pytest.param(lark_grammar("start: " + "(" * 60_000 + '"a"' + ")" * 60_000), id="parentheses")
    yield pytest.param(json_schema_grammar(json.loads('{"items":' * 500 + "{}" + "}" * 500)), id="nested")


@pytest.mark.parametrize("grammar", list(deep_grammars()))
def test_no_depth_brings_the_process_down(grammar: str, compiler: GrammarCompiler) -> None:
    assert MOST_CHARS // 2 < len(grammar) <= MOST_CHARS or "items" in grammar

    def follow() -> None:
        with contextlib.suppress(InvalidRequest):
            compiler.compile(grammar).deep_copy().compute_bitmask()

    thread = compile_thread()
    thread.submit(follow).result()
