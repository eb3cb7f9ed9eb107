"""The model card's text: everything it states comes from the run's own files and measurements."""

from dataclasses import dataclass
from string import Template
from typing import Any

from penstock.eval.sets.library import HELD_OUT_MODULES


@dataclass(frozen=True, kw_only=True, slots=True)
class CardNumbers:
    """What one run and its evaluation found."""

    parameters: int
    step: int
    num_tokens: int
    minutes: float
    sizes: dict[str, int]
    train: dict[str, Any]
    scores: dict[str, Any]


def model_card(numbers: CardNumbers) -> str:
    """README.md of the exported model."""
    scores = numbers.scores
    rows = "\n".join(f"| `{name}` | {text} |" for name, text in scores["answers"].items())
    return CARD.substitute(
        parameters=f"{numbers.parameters / 1e6:.2f} million",
        step=f"{numbers.step:,}",
        step_plain=numbers.step,
        tokens=f"{numbers.num_tokens / 1e6:.2f} million",
        minutes=f"{numbers.minutes:.0f}",
        batch_tokens=f"{numbers.train['batch_tokens']:,}",
        source_tokens=f"{numbers.sizes['source_tokens'] / 1e6:.2f} million",
        held_out_tokens=f"{numbers.sizes['held_out_tokens']:,}",
        questions=f"{numbers.sizes['questions']:,}",
        chat_share=f"{numbers.train['chat_share']:.0%}",
        late_chat_share=f"{numbers.train['late_chat_share']:.0%}",
        short_length=numbers.train["short_length"],
        long_length=numbers.train["long_length"],
        long_share=f"{numbers.train['long_share']:.0%}",
        held_out_modules=", ".join(f"`{name}`" for name in sorted(HELD_OUT_MODULES)),
        loss=f"{scores['held_out_loss']:.3f}",
        perplexity=f"{scores['held_out_perplexity']:.2f}",
        byte_perplexity=f"{scores['held_out_perplexity_per_byte']:.3f}",
        popular=f"{scores['exact_match_popular']:.1%}",
        seen=f"{scores['exact_match_seen']:.1%}",
        paraphrase_popular=f"{scores['exact_match_paraphrase_popular']:.1%}",
        paraphrase=f"{scores['exact_match_paraphrase']:.1%}",
        held_out_objects=f"{scores['exact_match_held_out_modules']:.1%}",
        refusals=f"{scores['exact_match_refusals']:.0%}",
        num_seen=f"{scores['num_seen']:,}",
        num_popular=f"{scores['num_popular']:,}",
        num_held_out=f"{scores['num_held_out']:,}",
        answers=rows,
    )


CARD = Template("""\
---
license: apache-2.0
language:
- en
library_name: transformers
pipeline_tag: text-generation
tags:
- llama
- code
- python
- demo
---

# penstock-mini

A Llama-shaped language model of $parameters parameters, small enough to ship inside the Penstock package. It
completes Python and answers one-line questions about Python's standard library. It is a demo and a test
subject: something real to serve, measure and compress on any machine, with no download.

## Shape

Llama decoder: 6 layers, width 256, 4 query heads and 2 KV heads of 64, gated feed-forward of 768, rotary
positions (theta 10,000), tied embeddings, a byte-level BPE of 6,144 tokens, ChatML turns
(`<|im_start|>`, `<|im_end|>`). Weights are bfloat16.

## Data

Only what a Python 3.11 installation contains:

- **Source**: the standard library's own `.py` files without tests, tables and bundled programs,
  $source_tokens tokens.
- **Chats**: $questions questions made from the docstrings of public functions, classes and modules, and of the
  methods of the best-known classes. The answer is the docstring's first sentence, or a signature, an example or a
  module's name. A few dozen more cover greetings, what the model is, and declining what it does not know.

The standard library is distributed under the Python Software Foundation License Version 2; its text was used for
training and the model repeats parts of it. The weights are under Apache-2.0.

Held out from training, tokenizer included: four phrasings of the question "what does X do?", and these modules
($held_out_tokens tokens of source): $held_out_modules.

## Training

$step steps of $batch_tokens tokens ($tokens in all), $minutes minutes on three threads of a shared
four-core x86-64 machine (AVX2), in float32. $chat_share of the rows were chats ($late_chat_share while the rate
fell), with loss on the answers only. Rows were $short_length tokens long, $long_share of the steps $long_length.
Muon for the matrices inside the layers, AdamW for the rest; short warm-up, constant rate for half the budget,
linear fall to zero over the other half. Over its last tenth, at falling rates, the held-out loss moved from 3.60 to
3.54 on the first 16 thousand held-out tokens: it was flattening, though not flat.

To reproduce, from the repository's root, with Python 3.11:

    python -m training.train --steps $step_plain --out runs/mini
    python -m training.export runs/mini

The shipped run's schedule followed wall time (`--minutes`). It was planned for 82 minutes, ran to their end, and was
then continued to 205 from where such a run would be, so the numbers move a little; so they do with another Python
version, whose standard library is another.

## Measured

On the bfloat16 weights as shipped, by `training/evaluate.py`:

| what | value |
|---|---|
| held-out source, loss (nats per token) | $loss |
| held-out source, perplexity per token | $perplexity |
| held-out source, perplexity per byte | $byte_perplexity |
| exact answer, best-known objects ($num_popular), a trained phrasing | $popular |
| exact answer, all trained objects ($num_seen), a trained phrasing | $seen |
| exact answer, best-known objects, held-out phrasings | $paraphrase_popular |
| exact answer, all trained objects, held-out phrasings | $paraphrase |
| exact answer, objects of held-out modules ($num_held_out) | $held_out_objects |
| declining five off-topic questions not trained on | $refusals |

"Exact" means that greedy decoding gives the docstring's first sentence word for word. Groups of more than 1,000
objects are sampled. An answer that differs by one word counts as wrong, and may still be right.

Greedy answers to "What does X do?":

| X | answer |
|---|---|
$answers

## What it cannot do

- It knows nothing but the standard library, and little of that beyond first sentences. It declines some
  other questions because it was shown such refusals; it invents an answer to many more.
- Asked about a function it never saw, it answers in the right style and wrongly. It does not know that it does
  not know.
- Its completions have the look of library code (indentation, `self`, docstrings, common calls) for a line or
  two. Greedy ones soon repeat themselves; sampling at temperature 0.8 reads better. They seldom do anything
  useful. It does not follow instructions, reason, calculate or debug.
- Less common objects, signatures, "which module" questions and unusual wordings are often answered with another
  object's sentence, as the table above shows.
- A conversation's earlier turns hardly help it. English only.
- Text beyond $long_length tokens was never trained on.

Do not use it for anything but trying out and testing a server.
""")
