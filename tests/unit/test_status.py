"""Tables of `unicluster status`, at all widths and in all states."""

import io
from dataclasses import replace

import pytest
from rich.console import Console

from coordinator.terminal.status import status_table
from unicluster.client.answers import ChatInfo, ServedStage
from unicluster.client.metrics import (
    Histogram,
    HopMetrics,
    Metrics,
    Speculation,
    StageMetrics,
)

GB = 10**9
NAMES = ("studio-of-ann", "framework [2]")
INFO = ChatInfo(
    model="llama-70b",
    quant="q8",
    context=8192,
    users=4,
    state="ready",
    detail="",
    stages=(ServedStage(NAMES[0], 0, 50, 50 * GB), ServedStage(NAMES[1], 50, 80, 30 * GB)),
    live_caches=0,
    lanes=2,
)
BEFORE = Metrics(
    info=INFO,
    now_s=100.0,
    stages=tuple(StageMetrics(name, 10, 5.0, 1.0, 0.041) for name in NAMES),
    hops=tuple(HopMetrics(*way, 10, 0.01, 3 * GB, 0.00042) for way in (NAMES, NAMES[::-1])),
    time_to_first_token=Histogram((1.0, 2.0), (0, 4, 0), 6.0),
    between_tokens=Histogram((0.1, 0.2), (100, 0, 0), 8.0),
    ended={"stop": 3, "length": 0, "cancelled": 1, "failed": 0},
    generated_tokens=1000,
    prompt_tokens=500,
    reused_tokens=200,
    running=2,
    waiting=1,
    cached_bytes=GB,
    reserved_bytes=2 * GB,
    cache_bytes=8 * GB,
)
# Ten seconds later: the first machine has worked for nine of them.
NOW = replace(
    BEFORE,
    now_s=110.0,
    generated_tokens=1400,
    stages=(
        replace(BEFORE.stages[0], busy_s=14.0, queue_s=6.0),
        replace(BEFORE.stages[1], busy_s=9.0),
    ),
)


def shown(metrics: Metrics, width: int = 120) -> str:
    out = io.StringIO()
    Console(file=out, width=width).print(status_table(metrics, "192.168.1.21:47700"))
    return out.getvalue()


@pytest.mark.parametrize("width", [80, 120])
def test_it_says_what_is_served_and_how_busy_that_keeps_the_machines(width: int) -> None:
    text = shown(NOW.since(BEFORE), width)

    for part in (
        *("llama-70b q8 at 192.168.1.21:47700: ready", *NAMES, "0-49", "50-79", "90 %", "40 %"),
        *("0.50", "41", "0.42", "context 8192, 4 users, 2 lanes"),
        "40.0 tokens/s now, 1400 in total",
        *("2 running, 1 waiting, 1 cancelled, 3 completed", "TTFT 1.50 s"),
        "500 tokens, 200 of them from the prefix cache",
        *("2.0 GB reserved", "1.0 GB cached, of 8.0 GB"),
    ):
        assert part in text
    assert max(map(len, text.splitlines())) <= width


@pytest.mark.parametrize("width", [80, 120])
def test_threads_are_shown_where_an_engine_says_how_many(width: int) -> None:
    first, second = NOW.stages
    mixed = replace(NOW, stages=(first, replace(second, threads=6)))

    header, line = (
        next(line for line in shown(mixed, width).splitlines() if part in line)
        for part in ("layers", NAMES[1])
    )

    end = header.index("threads") + len("threads")
    assert line[:end].split()[-1] == "6"
    assert "threads" not in shown(NOW, width)


def test_drafted_tokens_are_shown_where_there_are_any() -> None:
    drafting = replace(NOW, drafted_tokens=200, accepted_tokens=150)

    assert "200 tokens, 75 % accepted" in shown(drafting)
    assert "drafted" not in shown(NOW)


def test_how_tokens_are_guessed_is_shown() -> None:
    fresh = replace(NOW, speculation=Speculation("auto", depth=3, width=1))
    measured = replace(NOW, speculation=Speculation("model", 3, 4, plain_s=0.06, guessing_s=0.03))
    in_one_trip = replace(NOW, speculation=Speculation("lookup"))

    assert "auto, 3 frames in flight" in shown(fresh)
    assert "plain decode" not in shown(fresh)
    assert "model, 3 frames in flight of 4 tokens, 2.00 x plain decode" in shown(measured)
    assert "speculation" in shown(in_one_trip)
    assert "speculation" not in shown(NOW)


def test_without_a_head_there_is_the_reason_instead_of_figures() -> None:
    lost = Metrics(replace(INFO, state="recovering", detail="machine studio-of-ann stopped"))

    text = shown(lost)

    assert "recovering\nmachine studio-of-ann stopped" in text
    assert "0-49" in text
    assert "tokens " not in text


def test_a_head_that_was_started_anew_has_no_rates_yet() -> None:
    anew = replace(NOW, now_s=3.0, generated_tokens=5)

    assert anew.since(NOW).tokens_per_s == 0
    assert [stage.busy for stage in anew.since(NOW).stages] == [0, 0]
