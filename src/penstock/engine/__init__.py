"""The engine: continuous batching of token generation over one model, in this process or in its own.

``process.ProcessClient`` and ``aio.InProcessClient`` are its ends; nothing is imported here, for the engine process
needs neither the one nor the metrics that are kept beside it.
"""
