"""GGUF files: a model's metadata, tokenizer and tensors in one file.

``reader.read_gguf`` is the way in. It is imported where there is such a file, for numpy takes time and memory.
"""

from pathlib import Path


def is_gguf(path: Path) -> bool:
    """Return whether ``path`` is named like a GGUF file."""
    return path.suffix.lower() == ".gguf"
