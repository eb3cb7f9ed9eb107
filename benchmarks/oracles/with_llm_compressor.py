"""llm-compressor on tokens, where it is installed: `... MODEL TOKENS METHOD BITS GROUP SYMMETRIC OUT`."""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from transformers import AutoModelForCausalLM, AutoTokenizer

# Memory cannot be pinned where there is no accelerator.
IntermediatesCache.pin_memory = lambda self, batch_index: None


def quantize(model: str, tokens: str, method: str, bits: str, group: str, symmetric: str, out: str) -> None:
    """Write directory ``out``, in compressed-tensors' layout, and beside it what it says of the first sequence."""
    weights = QuantizationArgs(
        num_bits=int(bits), group_size=int(group), strategy="group", symmetric=symmetric == "true"
    )
    scheme = {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}
    if method == "gptq":
        recipe = [GPTQModifier(config_groups=scheme, ignore=["lm_head"], actorder="static")]
    else:
        recipe = [AWQModifier(duo_scaling="both"), QuantizationModifier(config_groups=scheme, ignore=["lm_head"])]
    sequences = json.loads(Path(tokens).read_text())
    calibration = Dataset.from_list([{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in sequences])
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    oneshot(
        model=loaded,
        processor=AutoTokenizer.from_pretrained(model),
        dataset=calibration,
        recipe=recipe,
        max_seq_length=max(map(len, sequences)),
        num_calibration_samples=len(sequences),
        output_dir=out,
    )
    reopened = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    with torch.inference_mode():
        logits = reopened(input_ids=torch.tensor([sequences[0]])).logits[0]
    np.save(f"{out}.logits.npy", logits.numpy())


if __name__ == "__main__":
    quantize(*sys.argv[1:])
