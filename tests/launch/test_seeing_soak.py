"""A real server whose encoder processes are killed while 64 clients ask it about drawings and text."""

import asyncio
import base64
import io
import random
from typing import Any

import aiohttp
import psutil
import pytest

from penstock.eval.sets.drawings import draw
from tests.commands import Server, serving
from tests.launch.test_soak import gauge

NUM_CLIENTS = 64
NUM_REQUESTS = 192
ANSWERS_A_KILL = 40


def draw_body(number: int) -> dict[str, Any]:
    """Return a greedy request about no drawing, one or two, none of them in another request."""
    draws = random.Random(number)
    content: list[dict[str, Any]] = []
    for place in range(number % 3):
        file = io.BytesIO()
        draw("held_out", 2 * number + place).image.save(file, format="PNG")
        url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
        content.append({"type": "image_url", "image_url": {"url": url}})
    text = draws.choice(("What is drawn?", "What does textwrap.dedent do?", "Describe it."))
    message = {"role": "user", "content": [*content, {"type": "text", "text": text}]}
    return {"messages": [message], "temperature": 0, "max_tokens": draws.randint(4, 24)}


def encoders_of(server: Server) -> list[psutil.Process]:
    found = []
    for process in psutil.Process(server.process.pid).children(recursive=True):
        try:
            if "penstock.launch.encoder" in process.cmdline():
                found.append(process)
        except psutil.Error:  # killed a moment ago
            pass
    return found


async def ask_all(server: Server, *, kill: bool) -> dict[int, str]:
    """Return the answer to each request, whatever is killed meanwhile."""
    waiting = list(range(NUM_REQUESTS))
    answers: dict[int, str] = {}

    async def client(session: aiohttp.ClientSession) -> None:
        while waiting:
            number = waiting.pop()
            async with session.post("/v1/chat/completions", json=draw_body(number)) as response:
                answer = await response.json()
                assert response.status == 200, answer
            answers[number] = answer["choices"][0]["message"]["content"]
            if kill and len(answers) % ANSWERS_A_KILL == 0:
                for process in encoders_of(server):
                    process.kill()

    timeout = aiohttp.ClientTimeout(total=120)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(server.url, connector=connector, timeout=timeout) as session:
        await asyncio.gather(*(client(session) for _ in range(NUM_CLIENTS)))
    return answers


@pytest.mark.slow
def test_64_clients_get_their_answers_when_encoders_are_killed() -> None:
    with serving("penstock-mini", "--encoder-workers", "2") as server:
        assert len(encoders_of(server)) == 2
        answers = asyncio.run(ask_all(server, kill=True))
        assert gauge(server.url, "penstock_encoder_worker_restarts_total") > 0
        assert gauge(server.url, "penstock_engine_restarts_total") == 0
    with serving("penstock-mini") as undisturbed:
        assert answers == asyncio.run(ask_all(undisturbed, kill=False))
