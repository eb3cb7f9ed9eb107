"""What passes compute with, for annotations: torch's tensors, and arrays that stand in for them.

The type is torch's to type checkers and nothing at run time, so that modules which only hand tensors on do not import
torch for its name: where kernels are compiled a text model is served without it.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor as Tensor
else:
    Tensor = Any
