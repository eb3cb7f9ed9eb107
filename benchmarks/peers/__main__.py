"""Penstock and its peers on one machine, by turns.

    python -m benchmarks.peers --install llama.cpp,openvino     environments under runs/, once
    python -m benchmarks.peers --out benchmarks/results/2026-01-31-peers
    python -m benchmarks.peers --peers llama.cpp:Q8_0 --precisions INT8 --workloads a,c --pairs 3

Every system reads the same random weights of a published shape, decodes greedily past the end of sequence, and is
given the same threads and the same room for its cache. Peers run in virtual environments of their own. All systems
stay loaded; in each round of a load each takes its turn.
"""

import argparse
import asyncio
import json
import signal
import sys
from collections.abc import Collection, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.peers.adapters import PEERS, PENSTOCK
from benchmarks.peers.machine import describe_machine, source_commit
from benchmarks.peers.model import SHAPES, make_model, prompt_token_ids
from benchmarks.peers.peer import REPOSITORY, Limits, NotInstalled, install
from benchmarks.peers.report import markdown, ratios, rows, spread, write_plot
from benchmarks.peers.turns import System, measure
from benchmarks.peers.workloads import CACHE_TOKENS, LOADS, MAX_RUNNING

_MAX_MODEL_TOKENS = 4096


def main() -> int:
    """Install or measure, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--install", metavar="PEERS", help="make these peers' environments, and stop")
    parser.add_argument("--peers", default="all", help="names, or name:precision, with commas; all, or none")
    parser.add_argument("--precisions", default="all", help="Penstock's, with commas; all, or none")
    parser.add_argument("--workloads", default=",".join(LOADS), help="letters with commas")
    parser.add_argument("--pairs", type=int, default=3, help="rounds of each workload")
    parser.add_argument("--starts", type=int, default=3, help="cold starts of each system")
    parser.add_argument("--threads", type=int, default=3, help="of each system")
    parser.add_argument("--shape", choices=SHAPES, default="qwen2.5-0.5b")
    parser.add_argument("--home", type=Path, default=REPOSITORY / "runs", help="environments, models, logs")
    parser.add_argument("--out", type=Path, metavar="STEM", help="write STEM.json, STEM.md and STEM.png")
    arguments = parser.parse_args()
    home: Path = arguments.home.resolve()
    if arguments.install is not None:
        return _install(arguments.install.split(","), home)
    # A stop asked for by another process ends what was started here too, as Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        systems = _choose(arguments.precisions, arguments.peers, home)
        loads = _known(arguments.workloads.split(","), LOADS, "workload")
    except ValueError as error:
        parser.error(str(error))

    shape = SHAPES[arguments.shape]
    limits = Limits(
        threads=arguments.threads,
        cache_tokens=CACHE_TOKENS,
        kv_bytes_per_token=shape.kv_bytes_per_token,
        max_running=MAX_RUNNING,
        max_model_tokens=_MAX_MODEL_TOKENS,
    )
    model = make_model(home / "models" / arguments.shape, shape)
    commit = source_commit()
    try:
        asyncio.run(
            measure(
                systems,
                model=model,
                home=home,
                loads=loads,
                rounds=arguments.pairs,
                starts=arguments.starts,
                token_ids=prompt_token_ids(shape),
                limits=limits,
            )
        )
    except KeyboardInterrupt:
        print("told to stop; what was measured until now:")
    conditions = _conditions(systems, commit, arguments)
    text = markdown(systems, conditions)
    print(text)
    if arguments.out is not None:
        _write(arguments.out, systems, conditions, text)
    return 0


def _install(names: Sequence[str], home: Path) -> int:
    for name in _known(names, [peer.name for peer in PEERS], "peer"):
        peer = next(peer for peer in PEERS if peer.name == name)
        environment = home / "envs" / name
        try:
            install(peer, environment)
            print(f"{name} {peer.version(environment)} is installed in {environment}")
        except NotInstalled as error:
            print(f"{name} is not installed: {error}")
            return 1
    return 0


def _choose(precisions: str, peers: str, home: Path) -> list[System]:
    """Return what is to be measured, Penstock first. Raises ValueError for unknown names."""
    ours = {"all": PENSTOCK.precisions, "none": ()}.get(precisions)
    ours = tuple(_known(precisions.split(","), PENSTOCK.precisions, "precision")) if ours is None else ours
    every = [f"{peer.name}:{precision}" for peer in PEERS for precision in peer.precisions]
    known = {
        **{name: [name] for name in every},
        **{peer.name: [name for name in every if name.startswith(f"{peer.name}:")] for peer in PEERS},
        "all": every,
        "none": [],
    }
    wanted = {name for given in _known(peers.split(","), known, "peer") for name in known[given]}
    return [
        System(peer=peer, precision=precision, environment=home / "envs" / peer.name)
        for peer in (PENSTOCK, *PEERS)
        for precision in peer.precisions
        if (peer is PENSTOCK and precision in ours) or f"{peer.name}:{precision}" in wanted
    ]


def _known(names: Sequence[str], known: Collection[str], kind: str) -> list[str]:
    for name in names:
        if name not in known:
            raise ValueError(f"{name!r} is no {kind}; there are {', '.join(known)}")
    return list(names)


def _conditions(systems: Sequence[System], commit: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return all that is needed to run it again, and where and beside what it ran."""
    turns = [turn for system in systems for turn in system.turns]
    return {
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
        "commit": commit,
        "command": " ".join(["python -m benchmarks.peers", *sys.argv[1:]]),
        "machine": describe_machine(),
        "threads": arguments.threads,
        "model": {"shape": arguments.shape, **asdict(SHAPES[arguments.shape]), "weights": "random, bfloat16"},
        "cache_tokens": CACHE_TOKENS,
        "max_running": MAX_RUNNING,
        "workloads": {load: LOADS[load].label for load in LOADS},
        "read_gb_per_s": spread([turn.read_bytes_per_s / 1e9 for turn in turns]),
        "cores_busy_with_others": spread([turn.others_cores for turn in turns]),
    }


def _write(stem: Path, systems: Sequence[System], conditions: dict[str, Any], text: str) -> None:
    table = rows(systems)
    report = {
        "conditions": conditions,
        "systems": [system.to_json() for system in systems],
        "figures": {row.label: {name: spread(values) for name, values in row.values.items()} for row in table},
        "ratios": [asdict(ratio) | {"median": ratio.median} for ratio in ratios(table)],
    }
    Path(f"{stem}.json").write_text(json.dumps(report, indent=1) + "\n")
    Path(f"{stem}.md").write_text(text)
    write_plot(
        Path(f"{stem}.png"),
        systems,
        f"{conditions['model']['shape']}, threads: {conditions['threads']}, {conditions['machine']['processor']}, "
        f"{conditions['date'][:10]}, {conditions['commit']}",
    )


if __name__ == "__main__":
    sys.exit(main())
