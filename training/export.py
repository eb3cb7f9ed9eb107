"""Export a run in Hugging Face layout: `python -m training.export runs/finds`.

Writes config.json, model.safetensors (bfloat16), the tokenizer with its chat template, generation_config.json, what
prepares images and the model card (README.md), whose numbers are measured here on the rounded weights.
"""

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from training.card import CardNumbers, Part, model_card
from training.evaluate import score, score_seeing
from training.model import MiniModel, ModelConfig
from training.seeing import SeeingModel, TowerConfig
from training.tokenizer import (
    CHAT_TEMPLATE,
    END_OF_TEXT,
    IM_END,
    IM_START,
    IMAGE,
    SPECIAL_TOKENS,
    load_tokenizer,
    special_id,
)

ASSETS = Path(__file__).parents[1] / "src" / "penstock" / "assets" / "penstock-mini"


@dataclass(frozen=True, slots=True)
class Run:
    """A run directory's decoder and how far it came."""

    model: MiniModel
    tokenizer: Tokenizer
    settings: dict[str, Any]
    step: int
    num_tokens: int
    elapsed_s: float


@dataclass(frozen=True, slots=True)
class SeeingRun:
    """The model in a run directory of `training.see` or `training.find` and how far it came."""

    model: SeeingModel
    tokenizer: Tokenizer
    settings: dict[str, Any]
    step: int
    num_drawings: int
    elapsed_s: float


def load_run(directory: Path) -> Run:
    """The checkpoint in a run directory, weights rounded to bfloat16 but held in float32."""
    settings, state = _read(directory)
    model = MiniModel(ModelConfig(**settings["model"]))
    model.load_state_dict(rounded(state["model"]))
    tokenizer = load_tokenizer(directory / "tokenizer.json")
    return Run(model.eval(), tokenizer, settings, state["step"], state["num_tokens"], state["elapsed_s"])


def load_seeing_run(directory: Path) -> SeeingRun:
    """The checkpoint of `training.see` or `training.find`, weights rounded to bfloat16 but held in float32."""
    settings, state = _read(directory)
    decoder = MiniModel(ModelConfig(**settings["model"]))
    model = SeeingModel(TowerConfig(**settings["tower"]), decoder)
    model.load_state_dict(rounded(state["model"]))
    tokenizer = load_tokenizer(directory / "tokenizer.json")
    return SeeingRun(model.eval(), tokenizer, settings, state["step"], state["num_drawings"], state["elapsed_s"])


def _read(directory: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    settings = json.loads((directory / "run.json").read_text())
    return settings, torch.load(directory / "checkpoint.pt", weights_only=True)


def rounded(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The values that bfloat16 keeps of them, in float32."""
    return {name: tensor.bfloat16().float() for name, tensor in tensors.items()}


def write_model(model: SeeingModel, tokenizer: Tokenizer, out: Path) -> None:
    """Everything a loader of Hugging Face directories needs; the card is separate."""
    out.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.bfloat16().contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    # The writer makes a private file; a packaged one is for everybody to read.
    (out / "model.safetensors").chmod(0o644)
    tokenizer.save(str(out / "tokenizer.json"))
    text = model.language_model.config
    _write_json(out / "config.json", hugging_face_config(model, tokenizer))
    _write_json(out / "tokenizer_config.json", tokenizer_config(text, tokenizer))
    # A file of its own is what both the tokenizer and the processor of transformers read.
    (out / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    _write_json(out / "generation_config.json", generation_config(tokenizer))
    _write_json(out / "preprocessor_config.json", preprocessor_config(model.config))
    _write_json(out / "processor_config.json", processor_config(model.config))


def hugging_face_config(model: SeeingModel, tokenizer: Tokenizer) -> dict[str, Any]:
    """config.json of a LLaVA of this shape."""
    ends = {"eos_token_id": special_id(tokenizer, IM_END), "pad_token_id": special_id(tokenizer, END_OF_TEXT)}
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "text_config": {**text_config(model.language_model.config), **ends},
        "vision_config": vision_config(model.config),
        "image_token_index": special_id(tokenizer, IMAGE),
        "image_seq_length": model.config.num_patches,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "tie_word_embeddings": True,
        **ends,
        "torch_dtype": "bfloat16",
    }


def text_config(config: ModelConfig) -> dict[str, Any]:
    """The decoder's part of config.json: a tied Llama."""
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
        "torch_dtype": "bfloat16",
    }


def vision_config(config: TowerConfig) -> dict[str, Any]:
    """The tower's part of config.json: SigLIP's without the head that pools."""
    return {
        "model_type": "siglip_vision_model",
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "num_channels": 3,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": config.norm_eps,
        "attention_dropout": 0.0,
        "vision_use_head": False,
        "torch_dtype": "bfloat16",
    }


def preprocessor_config(config: TowerConfig) -> dict[str, Any]:
    """preprocessor_config.json: how an image becomes what `pixels_of` makes of it."""
    return {
        "image_processor_type": "SiglipImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": config.image_size, "width": config.image_size},
        "resample": int(Image.Resampling.BICUBIC),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }


def processor_config(config: TowerConfig) -> dict[str, Any]:
    """processor_config.json: how many tokens an image becomes."""
    return {
        "processor_class": "LlavaProcessor",
        "image_token": IMAGE,
        "patch_size": config.patch_size,
        "num_additional_image_tokens": 0,
        "vision_feature_select_strategy": "full",
    }


def tokenizer_config(config: ModelConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """tokenizer_config.json; no token is ever added around a text."""
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
        "processor_class": "LlavaProcessor",
        "added_tokens_decoder": special,
        "additional_special_tokens": [IM_START, IM_END, IMAGE],
        "bos_token": None,
        "eos_token": IM_END,
        "pad_token": END_OF_TEXT,
        "unk_token": None,
        "image_token": IMAGE,
        "model_max_length": config.max_positions,
        "clean_up_tokenization_spaces": False,
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


def _scores_before(run: Run, directory: Path) -> dict[str, Any]:
    """The decoder's scores before it saw, kept in its directory: measuring takes minutes."""
    kept = directory / "scores.json"
    if not kept.exists():
        _write_json(kept, asdict(score(run.model, run.tokenizer, run.settings["train"]["seed"])))
    scores: dict[str, Any] = json.loads(kept.read_text())
    return scores


def main() -> None:
    """Parse the command line and export."""
    parser = argparse.ArgumentParser(description="Export a run in Hugging Face layout.")
    parser.add_argument("run", type=Path, help="the directory given to training.find as --out")
    parser.add_argument("--out", type=Path, default=ASSETS)
    parser.add_argument("--threads", type=int, default=3)
    parser.add_argument("--language", type=Path, help="the decoder's run, for measurements and README.md; else neither")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    run = load_seeing_run(arguments.run)
    write_model(run.model, run.tokenizer, arguments.out)
    if arguments.language is not None:
        language = load_run(arguments.language)
        seed, settings, came = language.settings["train"]["seed"], run.settings, run.settings["came"]
        found_s = run.elapsed_s - came["elapsed_s"]
        numbers = CardNumbers(
            parameters=sum(p.numel() for p in run.model.parameters()),
            new_parameters=sum(p.numel() for _, p in run.model.new_parameters()),
            language=Part(language.step, language.num_tokens, language.elapsed_s / 60, language.settings),
            seeing=Part(came["step"], came["num_drawings"], came["elapsed_s"] / 60, settings),
            finding=Part(run.step - came["step"], run.num_drawings - came["num_drawings"], found_s / 60, settings),
            before=_scores_before(language, arguments.language),
            scores=asdict(score(run.model.language_model, run.tokenizer, seed)),
            drawings=asdict(score_seeing(run.model, run.tokenizer)),
        )
        print(json.dumps(asdict(numbers), indent=2))
        (arguments.out / "README.md").write_text(model_card(numbers))


if __name__ == "__main__":
    main()
