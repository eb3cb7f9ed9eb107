"""Matrix products of packed tokens with weights."""
