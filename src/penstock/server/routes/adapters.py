"""Loading and unloading LoRA adapters at run time, as vLLM names the routes."""

from fastapi import FastAPI

from penstock.errors import InvalidRequest
from penstock.server.api import API
from penstock.server.replies import ERRORS
from penstock.server.schemas import LoadAdapterRequest, UnloadAdapterRequest


def add_adapters(app: FastAPI, api: API) -> None:
    """Add the routes."""

    @app.post("/v1/load_lora_adapter", responses=ERRORS)
    async def load_lora_adapter(body: LoadAdapterRequest) -> dict[str, str]:
        """Load an adapter from a directory on the server; it is then a model of that name."""
        if body.lora_name in api.base_names:
            raise InvalidRequest(
                f"{body.lora_name!r} is the model's own name; choose another for the adapter", param="lora_name"
            )
        await api.client.load_adapter(body.lora_name, body.lora_path)
        return {"id": body.lora_name, "status": "loaded"}

    @app.post("/v1/unload_lora_adapter", responses=ERRORS)
    async def unload_lora_adapter(body: UnloadAdapterRequest) -> dict[str, str]:
        """Take no more requests for an adapter; those that run go on."""
        await api.client.unload_adapter(body.lora_name)
        return {"id": body.lora_name, "status": "unloaded"}
