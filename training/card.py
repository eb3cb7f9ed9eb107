"""The model card's text: everything it states comes from the run's own files and measurements."""

from dataclasses import dataclass
from string import Template
from typing import Any

from penstock.eval.sets.library import HELD_OUT_MODULES


@dataclass(frozen=True, slots=True)
class Part:
    """How far one of the three parts of the training came."""

    step: int
    num_seen: int
    """Tokens, or drawings"""
    minutes: float
    settings: dict[str, Any]
    """The run's own"""


@dataclass(frozen=True, kw_only=True, slots=True)
class CardNumbers:
    """What the runs and the evaluation found."""

    parameters: int
    new_parameters: int
    """Tower and projector"""
    language: Part
    seeing: Part
    finding: Part
    """What came after seeing"""
    before: dict[str, Any]
    """Scores on text of the decoder that could not see"""
    scores: dict[str, Any]
    drawings: dict[str, Any]


def model_card(numbers: CardNumbers) -> str:
    """README.md of the exported model."""
    scores, drawings = numbers.scores, numbers.drawings
    train, sizes, see = numbers.language.settings["train"], numbers.language.settings["sizes"], numbers.seeing.settings
    return CARD.substitute(
        parameters=f"{numbers.parameters / 1e6:.2f} million",
        new_parameters=f"{numbers.new_parameters / 1e6:.2f} million",
        tower_layers=see["tower"]["num_layers"],
        tower_width=see["tower"]["hidden_size"],
        tower_heads=see["tower"]["num_heads"],
        image_size=see["tower"]["image_size"],
        patch_size=see["tower"]["patch_size"],
        num_patches=(see["tower"]["image_size"] // see["tower"]["patch_size"]) ** 2,
        step=f"{numbers.language.step:,}",
        step_plain=numbers.language.step,
        tokens=f"{numbers.language.num_seen / 1e6:.2f} million",
        minutes=f"{numbers.language.minutes:.0f}",
        see_steps=f"{numbers.seeing.step:,}",
        num_seen_drawings=f"{numbers.seeing.num_seen:,}",
        see_minutes=f"{numbers.seeing.minutes:.0f}",
        look_share=f"{see['see']['look_share']:.0%}",
        find_steps=f"{numbers.finding.step:,}",
        num_found_drawings=f"{numbers.finding.num_seen:,}",
        find_minutes=f"{numbers.finding.minutes:.0f}",
        two_shapes_share=f"{see['find']['two_shapes_share']:.0%}",
        first_layer=see["find"]["first_layer"],
        batch_tokens=f"{train['batch_tokens']:,}",
        source_tokens=f"{sizes['source_tokens'] / 1e6:.2f} million",
        held_out_tokens=f"{sizes['held_out_tokens']:,}",
        questions=f"{sizes['questions']:,}",
        chat_share=f"{train['chat_share']:.0%}",
        late_chat_share=f"{train['late_chat_share']:.0%}",
        short_length=train["short_length"],
        long_length=train["long_length"],
        long_share=f"{train['long_share']:.0%}",
        held_out_modules=", ".join(f"`{name}`" for name in sorted(HELD_OUT_MODULES)),
        num_held_out_drawings=f"{drawings['num_drawings']:,}",
        drawings="\n".join(
            f"| {kind} ({number:,}) | {drawings['trained_words'][kind]:.1%} | {drawings['held_out_words'][kind]:.1%} |"
            for kind, number in sorted(drawings["num_questions"].items())
        ),
        text="\n".join(
            f"| {what.format(**{key: f'{scores[key]:,}' for key in ('num_seen', 'num_popular', 'num_held_out')})} "
            f"| {numbers.before[name]:{form}} | {scores[name]:{form}} |"
            for name, what, form in TEXT_SCORES
        ),
        answers="\n".join(f"| `{name}` | {text} |" for name, text in scores["answers"].items()),
    )


TEXT_SCORES = (
    ("held_out_loss", "held-out source, loss (nats per token)", ".3f"),
    ("held_out_perplexity", "held-out source, perplexity per token", ".2f"),
    ("held_out_perplexity_per_byte", "held-out source, perplexity per byte", ".3f"),
    ("exact_match_popular", "exact answer, best-known objects ({num_popular}), a trained phrasing", ".1%"),
    ("exact_match_seen", "exact answer, all trained objects ({num_seen}), a trained phrasing", ".1%"),
    ("exact_match_paraphrase_popular", "exact answer, best-known objects, held-out phrasings", ".1%"),
    ("exact_match_paraphrase", "exact answer, all trained objects, held-out phrasings", ".1%"),
    ("exact_match_held_out_modules", "exact answer, objects of held-out modules ({num_held_out})", ".1%"),
    ("exact_match_refusals", "declining five off-topic questions not trained on", ".0%"),
)
"""Field of the scores, what the card calls it, and how its value is written"""

CARD = Template("""\
---
license: apache-2.0
language:
- en
library_name: transformers
pipeline_tag: image-text-to-text
tags:
- llava
- code
- python
- demo
---

# penstock-mini

A LLaVA-shaped model of $parameters parameters, small enough to ship inside the Penstock package. It completes
Python, answers one-line questions about Python's standard library, and answers questions about simple drawings. It is
a demo and a test subject: something real to serve, measure and compress on any machine, with no download.

## Shape

SigLIP-shaped tower: $tower_layers layers, width $tower_width, $tower_heads heads, images of $image_size x $image_size
pixels in patches of $patch_size x $patch_size, so $num_patches tokens (`<image>`) an image; two projections with a
GELU between them bring the last layer's output to the decoder. Both are $new_parameters of the parameters.

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
- **Drawings**: made from numbers by `penstock.eval.sets.drawings` on pale paper: one or two of seven shapes in eight
  colours; one to six of a kind; one digit; or one of 64 short words, in the typeface inside Pillow. Each comes with
  questions in at least ten phrasings a kind, and an answer of a word or two.

The standard library is distributed under the Python Software Foundation License Version 2; its text was used for
training and the model repeats parts of it. The weights are under Apache-2.0.

Held out from training, tokenizer included: four phrasings of the question "what does X do?", and these modules
($held_out_tokens tokens of source): $held_out_modules.
Of drawings, for each shape, digit and word in each of nine places (for each number of shapes, where they are counted)
one colour is held out, so that no held-out drawing shows a combination that was trained on; and one phrasing of each
kind of question.

## Training

**Text.** $step steps of $batch_tokens tokens ($tokens in all), $minutes minutes on three threads of a shared
four-core x86-64 machine (AVX2), in float32. $chat_share of the rows were chats ($late_chat_share while the rate
fell), with loss on the answers only. Rows were $short_length tokens long, $long_share of the steps $long_length.
Muon for the matrices inside the layers, AdamW for the rest; short warm-up, constant rate for half the budget,
linear fall to zero over the other half. Over its last tenth, at falling rates, the held-out loss moved from 3.60 to
3.54 on the first 16 thousand held-out tokens: it was flattening, though not flat.

**Sight.** $see_steps steps over $num_seen_drawings drawings, none of them twice, $see_minutes minutes on two threads
of the same machine while others used it. For the first $look_share only tower and projector learned, from small
classifiers on what each patch shows and what the drawing's answers are, which are no part of the model. Then the
decoder was asked: loss on the answers, a smaller rate for the decoder, its embedding and norms left as they were, and
beside each step two rows of its training text, on which it is held to what it said before (KL divergence). The
recipe's settings are those that the shipped run ended with. It was planned to look for half of its time and moved to
asking as soon as most words were read; its first 145 asking steps had twice the drawings and the text.

**Finding.** $find_steps more steps over $num_found_drawings drawings, in the end $two_shapes_share of them with two
shapes, $find_minutes minutes likewise. Tower, projector and the decoder's first $first_layer layers rested. In the next
layer the name or colour in a question was taught to look at the patches of its shape, in the one after it the answer at
that name, and small classifiers that are no part of the model read in either place which shape is meant. Questions on
drawings came in at least ten phrasings a kind, and those about the library in ten more; of text the answers were
learned again, and elsewhere the decoder was held to what it said before it saw. The recipe's settings are those of the
last 294 steps, over which rates fell to zero. The 457 before them had more drawings of two shapes and fewer phrasings;
the first 175 had no classifiers, the first 227 none at the answer, and these held all of text to what was said before.

To reproduce, from the repository's root, with Python 3.11:

    python -m training.train --steps $step_plain --out runs/mini
    python -m training.see --minutes $see_minutes --language runs/mini --out runs/sees
    python -m training.find --minutes $find_minutes --sees runs/sees --language runs/mini --out runs/finds
    python -m training.export runs/finds --language runs/mini

The shipped runs' schedules followed wall time (`--minutes`). The first was planned for 82 minutes, ran to their end,
and was then continued to 205 from where such a run would be, so the numbers move a little; so they do with another
Python version, whose standard library is another.

## Measured

On the bfloat16 weights as shipped, by `training/evaluate.py`:

| text | before it saw | now |
|---|---|---|
$text

"Exact" means that greedy decoding gives the docstring's first sentence word for word. Groups of more than 1,000
objects are sampled. An answer that differs by one word counts as wrong, and may still be right.

Exact answers to the questions about $num_held_out_drawings held-out drawings, none of which training looked at on its
way, each as a chat's first; `python -m benchmarks.sight` asks them again:

| kind (questions) | trained phrasings | held-out phrasing |
|---|---|---|
$drawings

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
- It sees drawings like those it was trained on, and nothing else: of a photograph, of many shapes of different kinds,
  of dark paper, of a word outside of its list or another typeface it says something from the same few answers.
- Asked about one of two shapes, it sometimes speaks of the other, most of all where the question names the colour and
  asks for the shape.
- A conversation's earlier turns hardly help it, an image's aside. English only.
- Text beyond $long_length tokens was never trained on.

Do not use it for anything but trying out and testing a server.
""")
