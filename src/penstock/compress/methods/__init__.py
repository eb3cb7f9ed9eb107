"""Algorithms on the weights that share one input: from values and what is known of their inputs to codes or zeros."""
