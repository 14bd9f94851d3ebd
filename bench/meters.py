"""Cost of the meters: microseconds a token, beside the time to compute and send one.

python -m bench.meters
"""

import time
from collections.abc import Callable

from node.metering.meters import AnswerMeter
from node.metering.timeline import recording
from node.metering.trips import Trip, Trips
from node.ring.compute_thread import rested
from node.ring.leaves import leaf_bytes
from unicluster.v1.stage_pb2 import Frame

CALLS = 20_000
ROUNDS = 7


def cost(action: Callable[[], object]) -> float:
    """Microseconds a call, in the best round: others may use the machine too."""
    action()
    best = float("inf")
    for _ in range(ROUNDS):
        began = time.perf_counter()
        for _ in range(CALLS):
            action()
        best = min(best, time.perf_counter() - began)
    return best / CALLS * 1e6


def main() -> None:
    frame = Frame()
    tensor = frame.hidden.add(key="x").tensor
    tensor.dtype, tensor.data = "bfloat16", bytes(2 * 7168)
    tensor.shape.extend([1, 1, 7168])
    for stage in (1, 2):
        frame.reports.add(stage=stage, arrived_s=1.0, queue_s=1e-4, compute_s=1e-3)
    trips, meter = Trips(["ann", "bob", "cat"]), AnswerMeter()
    sent = time.perf_counter()

    def step() -> None:
        """Measurements that a lane's step adds: see Scheduler and Answer."""
        rested(), rested(), recording()
        time.perf_counter(), time.perf_counter(), time.perf_counter()
        meter.between_tokens.note(0.02)
        meter.step.note(0.02)

    def beside() -> None:
        trips.note(Trip(sent, sent + 0.01, leaf_bytes(frame.hidden), True, frame.reports))

    for what, action in (
        ("at the head, on the way of a token", step),
        ("at each other machine, on its way", lambda: leaf_bytes(frame.hidden)),
        ("beside it, on the head's network thread, 3 machines", beside),
    ):
        print(f"{what:52} {cost(action):5.1f} µs")


if __name__ == "__main__":
    main()
