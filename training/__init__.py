"""The recipe that makes penstock-mini, the demo model, out of Python's own standard library."""
