"""Addition to the residual stream."""
