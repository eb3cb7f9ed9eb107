"""Anthropic's Messages on top of chat completions."""
