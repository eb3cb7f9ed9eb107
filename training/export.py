"""Export a run in Hugging Face layout: `python -m training.export runs/mini`.

Writes config.json, model.safetensors (bfloat16), the tokenizer with its chat template, generation_config.json and
the model card (README.md), whose numbers are measured here on the rounded weights.
"""

import argparse
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from training.card import CardNumbers, model_card
from training.evaluate import Scores, score
from training.model import MiniModel, ModelConfig
from training.tokenizer import (
    CHAT_TEMPLATE,
    END_OF_TEXT,
    IM_END,
    IM_START,
    SPECIAL_TOKENS,
    load_tokenizer,
    special_id,
)

ASSETS = Path(__file__).parents[1] / "src" / "penstock" / "assets" / "penstock-mini"


@dataclass(frozen=True, slots=True)
class Run:
    """A run directory's model and how far it came."""

    model: MiniModel
    tokenizer: Tokenizer
    settings: dict[str, Any]
    step: int
    num_tokens: int
    elapsed_s: float


def load_run(directory: Path) -> Run:
    """The checkpoint in a run directory, weights rounded to bfloat16 but held in float32."""
    settings = json.loads((directory / "run.json").read_text())
    state = torch.load(directory / "checkpoint.pt", weights_only=True)
    names = {field.name for field in fields(ModelConfig)}
    model = MiniModel(ModelConfig(**{k: v for k, v in settings["model"].items() if k in names}))
    model.load_state_dict({name: tensor.bfloat16().float() for name, tensor in state["model"].items()})
    model.eval()
    tokenizer = load_tokenizer(directory / "tokenizer.json")
    return Run(model, tokenizer, settings, state["step"], state["num_tokens"], state["elapsed_s"])


def write_model(model: MiniModel, tokenizer: Tokenizer, out: Path) -> None:
    """Everything a loader of Hugging Face directories needs; the card is separate."""
    out.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.bfloat16().contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    # The writer makes a private file; a packaged one is for everybody to read.
    (out / "model.safetensors").chmod(0o644)
    tokenizer.save(str(out / "tokenizer.json"))
    _write_json(out / "config.json", hugging_face_config(model.config, tokenizer))
    _write_json(out / "tokenizer_config.json", tokenizer_config(model.config, tokenizer))
    _write_json(out / "generation_config.json", generation_config(tokenizer))


def hugging_face_config(config: ModelConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """config.json of a tied Llama of this shape."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_positions,
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "rms_norm_eps": config.norm_eps,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "initializer_range": 0.02,
        "use_cache": True,
        "bos_token_id": None,
        "eos_token_id": special_id(tokenizer, IM_END),
        "pad_token_id": special_id(tokenizer, END_OF_TEXT),
        "torch_dtype": "bfloat16",
    }


def tokenizer_config(config: ModelConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """tokenizer_config.json with the chat template; no token is ever added around a text."""
    special = {
        str(special_id(tokenizer, token)): {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": True,
        }
        for token in SPECIAL_TOKENS
    }
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "added_tokens_decoder": special,
        "additional_special_tokens": [IM_START, IM_END],
        "bos_token": None,
        "eos_token": IM_END,
        "pad_token": END_OF_TEXT,
        "unk_token": None,
        "model_max_length": config.max_positions,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }


def generation_config(tokenizer: Tokenizer) -> dict[str, Any]:
    """generation_config.json: greedy, ending at the end of a turn or of a text."""
    return {
        "do_sample": False,
        "eos_token_id": [special_id(tokenizer, IM_END), special_id(tokenizer, END_OF_TEXT)],
        "pad_token_id": special_id(tokenizer, END_OF_TEXT),
    }


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def card_numbers(run: Run, scores: Scores) -> CardNumbers:
    """What the card states, gathered."""
    return CardNumbers(
        parameters=sum(p.numel() for p in run.model.parameters()),
        step=run.step,
        num_tokens=run.num_tokens,
        minutes=run.elapsed_s / 60,
        sizes=run.settings["sizes"],
        train=run.settings["train"],
        scores=asdict(scores),
    )


def main() -> None:
    """Parse the command line and export."""
    parser = argparse.ArgumentParser(description="Export a run in Hugging Face layout.")
    parser.add_argument("run", type=Path, help="the directory given to training.train as --out")
    parser.add_argument("--out", type=Path, default=ASSETS)
    parser.add_argument("--threads", type=int, default=3)
    parser.add_argument("--without-card", action="store_true", help="skip the measurements and README.md")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    run = load_run(arguments.run)
    write_model(run.model, run.tokenizer, arguments.out)
    if not arguments.without_card:
        scores = score(run.model, run.tokenizer, run.settings["train"]["seed"])
        (arguments.out / "README.md").write_text(model_card(card_numbers(run, scores)))
        print(json.dumps(asdict(scores), indent=2))


if __name__ == "__main__":
    main()
