"""What a run of chaos prints, and when it says too little to pass."""

from typing import Any

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
