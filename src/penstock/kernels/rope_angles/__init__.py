"""Cosines and sines of rotary angles."""
