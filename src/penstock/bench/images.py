"""Images for a load: each one another, and as hard to compress as a photograph."""

import base64
import io

import numpy as np
from PIL import Image

_SPOTS = 24
"""Along each side"""
_NOISE = 6.0
"""Standard deviation, of 255: about what a camera adds"""


def draw_image(width: int, height: int, seed: int) -> str:
    """Return a JPEG of soft coloured spots as a data: URL, the same for the same seed."""
    random = np.random.default_rng(seed)
    spots = Image.fromarray(random.integers(0, 256, (_SPOTS, _SPOTS, 3), dtype=np.uint8))
    smooth = np.asarray(spots.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32)
    noisy = smooth + random.normal(0, _NOISE, smooth.shape).astype(np.float32)
    file = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
