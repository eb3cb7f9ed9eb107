"""penstock-mini's byte-level BPE, its special tokens and its chat format."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"
IM_START = "<|im_start|>"
IM_END = "<|im_end|>"
IMAGE = "<image>"
SPECIAL_TOKENS = (END_OF_TEXT, IM_START, IM_END, IMAGE, *(f"<|reserved_{n}|>" for n in range(1, 8)))
"""In id order from 0; the reserved ones are for features that may need a token of their own."""

VOCAB_SIZE = 6144
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Words with one leading mark or space, single digits, punctuation with its newline, and whole indents."""

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% endif %}"
    "{{ '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def train_tokenizer(texts: Iterable[str], vocab_size: int = VOCAB_SIZE) -> Tokenizer:
    """A byte-level BPE learned from `texts`; every string round-trips through it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=24,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer saved at `path`; one made before images had a token gives them its first reserved one."""
    return Tokenizer.from_str(path.read_text().replace('"<|reserved_0|>"', f'"{IMAGE}"'))


def special_id(tokenizer: Tokenizer, token: str) -> int:
    """The id of a special token, which every tokenizer made here has."""
    found = tokenizer.token_to_id(token)
    assert found is not None, token
    return found


class ChatEncoder:
    """Turns messages into the ids that `CHAT_TEMPLATE` would give."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.end_of_text_id = special_id(tokenizer, END_OF_TEXT)
        self.im_start_id = special_id(tokenizer, IM_START)
        self.im_end_id = special_id(tokenizer, IM_END)
        self.image_id = special_id(tokenizer, IMAGE)
        self.newline_ids = self.plain("\n")

    def plain(self, text: str) -> list[int]:
        """Ids of text in which special tokens are not looked for."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens left out."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    def documents(self, texts: Sequence[str]) -> NDArray[np.int32]:
        """The ids of all texts end to end, an end-of-text after each."""
        encoded = self.tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return np.concatenate([np.array([*e.ids, self.end_of_text_id], dtype=np.int32) for e in encoded])

    def message(self, role: str, content: str, num_patches: int = 0) -> list[int]:
        """One complete turn, its closing newline included, after an image of so many patches if there is one."""
        text = self.plain(f"{role}\n{content}")
        if num_patches:
            text = [*self.plain(f"{role}\n"), *[self.image_id] * num_patches, *self.plain(content)]
        return [self.im_start_id, *text, self.im_end_id, *self.newline_ids]

    def prompt(self, user: str, num_patches: int = 0) -> list[int]:
        """A user's turn and the opening of the assistant's: what generation starts from."""
        return [*self.message("user", user, num_patches), self.im_start_id, *self.plain("assistant\n")]

    def exchange(self, user: str, assistant: str, num_patches: int = 0) -> tuple[list[int], list[bool]]:
        """A question with its answer, and which of the ids are the answer's (its end mark included)."""
        prompt = self.prompt(user, num_patches)
        answer = [*self.plain(assistant), self.im_end_id]
        ids = [*prompt, *answer, *self.newline_ids]
        learned = [False] * len(prompt) + [True] * len(answer) + [False] * len(self.newline_ids)
        return ids, learned
