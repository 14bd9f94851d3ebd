"""What was measured, kept and used."""

from pathlib import Path

import pytest

from coordinator.learned import Learned, Measurement
from coordinator.links import Network
from coordinator.placement import Machine
from coordinator.planner import plan
from tests.fleets import GB, a_layout

LAYOUT = a_layout([GB] * 10)
FLEET = [Machine("ann", "", 6 * GB, 100e9), Machine("bob", "", 6 * GB, 100e9)]


def test_after_one_run_a_plan_predicts_what_was_measured(tmp_path: Path) -> None:
    known = Learned.load(tmp_path)
    known.record("ann", "llama", Measurement(0, 5, 0.125))
    known.record("bob", "llama", Measurement(5, 10, 0.075))
    known.record_hop("bob", "ann", 0.002)

    again = Learned.load(tmp_path)
    fleet = again.paced(FLEET, "llama", LAYOUT)
    found = plan(LAYOUT, fleet, network=Network(pairs=again.links(fleet)))

    layers = {s.machine.name: s.end - s.first for s in found.stages}
    assert layers["bob"] >= layers["ann"]  # he turned out faster, so he takes what he can hold
    per_layer = {"ann": 0.025, "bob": 0.015}
    expected = sum((s.end - s.first) * per_layer[s.machine.name] for s in found.stages) + 0.004
    assert found.seconds_per_token == pytest.approx(expected, rel=1e-6)
    assert all(stage.measured and stage.hop_measured for stage in found.stages)


def test_another_model_on_the_same_machine_is_still_assumed(tmp_path: Path) -> None:
    known = Learned.load(tmp_path)
    known.record("ann", "llama", Measurement(0, 5, 0.125))

    assert [(m.pace, m.measured) for m in known.paced(FLEET, "gemma", LAYOUT)] == [(1, False)] * 2


def test_a_machine_not_tried_yet_is_taken_to_be_off_by_as_much(tmp_path: Path) -> None:
    known = Learned.load(tmp_path)
    known.record("ann", "llama", Measurement(0, 5, 0.125))

    ann, bob = known.paced(FLEET, "llama", LAYOUT)

    assert ann.pace == bob.pace > 1.5
    assert (ann.measured, bob.measured) == (True, False)


def test_a_damaged_file_counts_for_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "measured.json").write_text("{")

    assert Learned.load(tmp_path).stages == {}
    assert "damaged" in caplog.text
