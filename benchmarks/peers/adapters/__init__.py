"""One file for each system that is measured: how it is installed, what it reads, how it is started."""

from benchmarks.peers.adapters.llama_cpp import LlamaCpp
from benchmarks.peers.adapters.onnxruntime import OnnxRuntime
from benchmarks.peers.adapters.openvino import OpenVino
from benchmarks.peers.adapters.penstock import Penstock
from benchmarks.peers.adapters.transformers import Transformers
from benchmarks.peers.adapters.vllm import Vllm
from benchmarks.peers.peer import Peer

PENSTOCK = Penstock()
PEERS: tuple[Peer, ...] = (LlamaCpp(), OpenVino(), Vllm(), OnnxRuntime(), Transformers())

__all__ = ["PEERS", "PENSTOCK"]
