"""Reference implementations on the same layer as ours, each in an environment of its own."""
