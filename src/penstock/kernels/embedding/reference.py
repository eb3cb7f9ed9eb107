"""T tokens, E width, V vocabulary."""

import torch
import torch.nn.functional as F
from torch import Tensor


def embed(token_ids: Tensor, table: Tensor, dtype: torch.dtype, *, scale: float = 1.0) -> Tensor:
    """Return the rows [T, E] of ``table`` [V, E] that ``token_ids`` [T] int64 name, times ``scale``, in ``dtype``.

    Raises ``IndexError`` for a token that is not in the table.
    """
    return F.embedding(token_ids, table).to(dtype) * scale
