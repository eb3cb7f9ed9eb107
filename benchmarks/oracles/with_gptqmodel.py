"""GPTQModel on tokens, where it is installed: `... MODEL TOKENS METHOD BITS GROUP SYMMETRIC OUT`."""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig


def quantize(model: str, tokens: str, method: str, bits: str, group: str, symmetric: str, out: str) -> None:
    """Write directory ``out``, in the layout of the method's name, and beside it what it says of the first sequence."""
    config = QuantizeConfig(
        method=method,
        format="gemm" if method == "awq" else "gptq",
        bits=int(bits),
        group_size=int(group),
        sym=symmetric == "true",
        # Act-order with static groups, which is what costs nothing where the result runs.
        **({"desc_act": True, "static_groups": True} if method == "gptq" else {}),
    )
    calibration = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in json.loads(Path(tokens).read_text())]
    loaded = GPTQModel.load(model, config, device="cpu", trust_remote_code=False)
    loaded.quantize(calibration, batch_size=1)
    loaded.save(out)
    backend = BACKEND.AWQ_TORCH if method == "awq" else BACKEND.GPTQ_TORCH
    reopened = GPTQModel.load(out, backend=backend, device="cpu", dtype=torch.float16)
    with torch.inference_mode():
        logits = reopened.model(input_ids=torch.tensor([calibration[0]["input_ids"]])).logits[0]
    np.save(f"{out}.logits.npy", logits.float().numpy())


if __name__ == "__main__":
    quantize(*sys.argv[1:])
