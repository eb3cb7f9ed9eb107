"""GGUF files: a model's metadata, tokenizer and tensors in one file."""

from penstock.gguf.reader import GGUFFile, TensorInfo, is_gguf, read_gguf

__all__ = ["GGUFFile", "TensorInfo", "is_gguf", "read_gguf"]
