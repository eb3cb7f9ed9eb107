"""OpenAI's Responses, the part that keeps nothing between requests, on top of chat completions."""
