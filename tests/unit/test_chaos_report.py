"""What a run of chaos prints, and when it says too little to pass."""

import re
import shutil
from pathlib import Path
from typing import Any

from tests.chaos.kept import TIMELINE, Timeline, keep, why_keep
from tests.chaos.report import WIDTH, table, too_little

FOUND: dict[str, Any] = {
    "seed": 7,
    "seconds": 321.0,
    "faults": {"worker killed": 30, "panic at stage.sent": 2, "panic at head.send": 3},
    "acted": ["head.send", "stage.sent"],
    "answers": {"whole and right": 40, "a typed error after a right part": 1},
    "refused": 9,
    "errors": {
        f"refused: UnavailableError: llama is recovering: machine eve (10.84.0.6:{port}) closed "
        "the connection, and no other one has room for its layers": 1
        for port in range(47001, 47010)
    },
    "gaps": [0.5, 2.0, 30.25],
    "parts": {"detect_s": [0.1] * 10, "plan_s": [0.0, 5.5], "load_s": [], "replay_s": [0.25]},
    "gave_up": ["code 86: llama is ready again after 3 s / at failpoint state.written: panic"],
    "wrong": [],
}


def test_it_is_as_wide_as_a_terminal() -> None:
    worst = FOUND | {"wrong": ["greedy, long prompt: log probability " + "x " * 100]}

    assert [line for line in table(worst, 200).splitlines() if len(line) > WIDTH] == []


def test_counts_and_times_are_read_off_it() -> None:
    lines = table(FOUND, 200).splitlines()

    assert lines[0] == "35 faults in 321 s, seed 7"
    assert "  panic at a place of the code                      5" in lines
    assert any(line.startswith("failpoints acted at 2 of ") for line in lines)
    assert "50 requests: 82 % met a running model, 9 were refused" in lines
    assert "seconds                       count   median  9 of 10  longest" in lines
    assert "silence of a disturbed answer     3     2.00     2.00    30.25" in lines
    assert "load                              0" in lines
    assert any(line.startswith("   9 x refused: UnavailableError: llama is") for line in lines)
    assert "200 faults were wanted, and there was time for 35" in lines


def test_few_faults_prove_nothing() -> None:
    assert too_little(FOUND) == ["35 faults, and 40 are the least that says anything"]
    assert "TOO LITTLE: 35 faults, and 40 are the least" in table(FOUND, 200)
    assert too_little(FOUND | {"faults": {"worker killed": 40}}) == []
    assert len(too_little(FOUND | {"answers": {}, "parts": {"detect_s": []}})) == 3


def test_logs_are_kept_of_a_run_that_was_slow_or_went_wrong() -> None:
    assert why_keep(FOUND) == []
    assert why_keep(FOUND, slow=20.0) == ["30.2 s of silence on a stream, and 20 s are the most"]
    slow = FOUND | {"parts": {**FOUND["parts"], "plan_s": [0.1, 144.0]}}
    assert why_keep(slow) == ["144.0 s of plan, and 45 s are the most"]
    assert why_keep(FOUND | {"wrong": ["seed: it ended without an end"]}) == [
        "WRONG: seed: it ended without an end"
    ]


def test_kept_logs_outlive_the_run_with_the_faults_beside_them(tmp_path: Path) -> None:
    (cluster := tmp_path / "cluster").mkdir()
    (cluster / "0-ann.err").write_text("12:00:00 INFO from ann\n")
    (cluster / "5-serve.err").write_bytes(b"12:00:01 \xff\n")
    (cluster / "5-serve.out").write_text("ready\n")
    (cluster / "home").mkdir()
    timeline = Timeline()
    timeline.note("fault 1: worker killed")

    folder = keep(cluster, timeline, ["144.0 s of plan"], tmp_path)
    shutil.rmtree(cluster)

    names = {path.name for path in folder.iterdir()}
    assert names == {"0-ann.err", "5-serve.err", "5-serve.out", TIMELINE, "why.txt"}
    assert (folder / "5-serve.err").read_bytes() == b"12:00:01 \xff\n"
    assert re.fullmatch(r"\d\d:\d\d:\d\d fault 1: worker killed\n", (folder / TIMELINE).read_text())
    assert keep(tmp_path / "never began", timeline, [], tmp_path) != folder
