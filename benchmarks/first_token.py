"""From the command to the first token: `python -m benchmarks.first_token`.

Starts `penstock serve` on the demo model and asks for a streamed answer until one comes; prints seconds from starting
the process to the first token's arrival, several times.
"""

import argparse
import json
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request


def measure() -> float:
    """Return the seconds of one start."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    body = {"messages": [{"role": "user", "content": "What does len do?"}], "temperature": 0, "stream": True}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    began = time.perf_counter()
    code = "from penstock.cli.main import main; main()"
    command = [sys.executable, "-c", code, "serve", "--port", str(port), "--log-level", "error"]
    server = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        while True:
            try:
                with urllib.request.urlopen(request) as answer:
                    for line in answer:
                        if b'"content":"' in line and b'"content":""' not in line:
                            return time.perf_counter() - began
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.02)
    finally:
        server.terminate()
        server.wait()


def main() -> None:
    """Print each start and the median."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=5)
    seconds = [measure() for _ in range(parser.parse_args().repetitions + 1)][1:]
    print(", ".join(f"{one:.2f}" for one in seconds), f"s; median {statistics.median(seconds):.2f} s")


if __name__ == "__main__":
    main()
