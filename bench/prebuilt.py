"""Gain of prebuilt decode steps on one stage, without any network.

    python -m bench.prebuilt [--layers 61] [--hidden 64] [--rounds N] [--tokens N]

Two stages over the same layers of a random llama, one with prebuilt steps and one without, take
turns of a few tokens. A token's time is measured from a frame's arrival to the frame for the next
hop, which leaves out the prebuilding that one of them does between frames. The CPU time of the
thread that serves the frame, without MLX's own threads, is comparable on a busy machine too.
"""

import argparse
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from node.mlx.hollow import HollowModel
from node.mlx.lazy import load_lazy, load_parts
from node.mlx.stage import MLXStage, StageCache
from node.mlx.tensors import encode_tree
from node.ring.session import Session
from tests.support.tiny import tiny_config, write_model
from unicluster.v1.stage_pb2 import CacheOp, Frame, StagePart

PROMPT_TOKENS = 32
WARM_UP = 5
TURN = 10  # tokens


@dataclass
class Subject:
    """A stage and the seconds that its tokens took."""

    stage: MLXStage
    hidden: int
    session: Session[StageCache, Any] = field(init=False)
    walls: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    numbers: int = 0

    def __post_init__(self) -> None:
        self.session = self.stage.open(1, last=True)

    def prefill(self) -> None:
        make = CacheOp(cache=1, make=CacheOp.Make())
        self.stage.serve(self.session, self._frame(PROMPT_TOKENS, make), 0.0)
        self.decode(WARM_UP)
        self.walls.clear()
        self.cpu.clear()

    def decode(self, tokens: int) -> None:
        for _ in range(tokens):
            frame = self._frame(1)
            began, used = time.perf_counter(), time.thread_time()
            self.stage.serve(self.session, frame, began)
            self.cpu.append(time.thread_time() - used)
            self.walls.append(time.perf_counter() - began)
            self.stage.look_ahead(self.session)

    def _frame(self, tokens: int, *ops: CacheOp) -> Frame:
        self.numbers += 1
        frame = Frame(id=self.numbers, hold=tokens > 1)
        frame.parts.append(StagePart(stage=1, ops=ops, cache=1))
        encode_tree(mx.random.normal((1, tokens, self.hidden)), frame.hidden)
        return frame


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=61)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=TURN, help="a turn")
    options = parser.parse_args()
    heads = max(options.hidden // 32, 1)
    config = tiny_config("llama") | {
        "num_hidden_layers": options.layers + 1,
        "hidden_size": options.hidden,
        "intermediate_size": 3 * options.hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": 32,
    }
    with tempfile.TemporaryDirectory() as folder:
        lazy = load_lazy(write_model(Path(folder), config))
        hollow = HollowModel(lazy.model, lazy.model_type, 1, options.layers + 1)
        for _ in load_parts(hollow.layers):
            pass
    off, on = (
        Subject(MLXStage(hollow, prebuilt=prebuilt), options.hidden) for prebuilt in (False, True)
    )
    off.prefill()
    on.prefill()
    for _ in range(options.rounds):
        off.decode(options.tokens)
        on.decode(options.tokens)
    print(f"{options.layers} layers, hidden size {options.hidden}; from arrival to answer, ms")
    print(f"{'':14}{'median':>10}{'10th %':>10}{'least':>10}{'CPU, median':>20}")
    for name, subject in (("usual", off), ("prebuilt", on)):
        times = np.array(subject.walls) * 1e3
        figures = np.median(times), np.percentile(times, 10), times.min()
        cpu = float(np.median(subject.cpu)) * 1e3
        print(f"{name:14}" + "".join(f"{figure:10.2f}" for figure in figures) + f"{cpu:20.2f}")
    turns = [np.reshape(s.walls, (options.rounds, -1)) for s in (off, on)]
    ratio = np.median(np.median(turns[1], axis=1) / np.median(turns[0], axis=1))
    print(f"prebuilt steps take {ratio:.2f} of the usual time, median of the rounds")


if __name__ == "__main__":
    main()
