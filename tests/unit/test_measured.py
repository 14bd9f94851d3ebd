"""Measurements: stored, and used by plans."""

from dataclasses import replace
from pathlib import Path

import pytest

from coordinator.fleet.measured import Measurements, TokenTimes, shared_out
from coordinator.planning.links import Network
from coordinator.planning.placement import Stage
from coordinator.planning.planner import plan
from coordinator.planning.stages import Span, stages
from coordinator.planning.variants import ModelVariants
from tests.support.fleets import GB, a_layout, a_machine

LAYOUT = a_layout([GB] * 10)
FLEET = [a_machine("ann", 6 * GB, 100e9), a_machine("bob", 6 * GB, 100e9)]


def ring(*spans: tuple[int, int]) -> tuple[Stage, ...]:
    """Ann's layers, then bob's."""
    both = zip(FLEET, spans, strict=False)
    return stages(Network(), [Span(machine, *span, LAYOUT) for machine, span in both])


def test_after_one_run_a_plan_predicts_what_was_measured(tmp_path: Path) -> None:
    Measurements.record(
        "llama", ring((0, 5), (5, 10)), TokenTimes((0.125, 0.075), (0.001, 0.003)), tmp_path
    )

    fleet = Measurements.load(tmp_path).fleet(FLEET, "llama", LAYOUT)
    found = plan(LAYOUT, fleet.machines, network=fleet.network)

    layers = {s.machine.name: s.end - s.first for s in found.stages}
    assert layers["bob"] >= layers["ann"]  # he turned out faster, so he takes what he can hold
    per_layer = {"ann": 0.025, "bob": 0.015}
    expected = sum((s.end - s.first) * per_layer[s.machine.name] for s in found.stages) + 0.004
    assert found.seconds_per_token == pytest.approx(expected, rel=1e-6)
    assert all(stage.measured and stage.hop_measured for stage in found.stages)


def test_of_a_token_timed_as_a_whole_stages_get_their_predicted_shares() -> None:
    predicted = ring((0, 8), (8, 10))

    times = shared_out(predicted, 2.0)

    hops = sum(stage.hop_s for stage in predicted)
    assert times.hops is None
    assert times.stages == pytest.approx(((2.0 - hops) * 0.8, (2.0 - hops) * 0.2))


def test_hops_known_to_take_longer_than_the_whole_token_are_measured_too() -> None:
    times = shared_out(ring((0, 5), (5, 10)), 0.2e-3)

    assert times.hops == pytest.approx((0.05e-3, 0.05e-3))
    assert sum(times.stages) == pytest.approx(0.1e-3)


def test_each_engine_has_a_slowdown_of_its_own(tmp_path: Path) -> None:
    gguf = replace(LAYOUT, engine="ggml")
    once = stages(Network(), [Span(FLEET[0], 0, 5, gguf)])
    Measurements.record("llama", once, TokenTimes((0.125,)), tmp_path)
    known = Measurements.record("llama", ring((0, 5)), TokenTimes((0.25,)), tmp_path)

    ann, bob = known.calibrated(FLEET, "llama", ModelVariants(LAYOUT, gguf))

    mlx, ggml = ann.engines["mlx"], ann.engines["ggml"]
    assert mlx.slowdown == pytest.approx(2 * ggml.slowdown)
    assert (mlx.measured, ggml.measured) == (True, True)
    slowdowns = [bob.engines[engine].slowdown for engine in ("mlx", "ggml")]
    assert slowdowns == [mlx.slowdown, ggml.slowdown]
    assert not bob.engines["ggml"].measured


def test_whether_a_stage_made_the_logits_counts(tmp_path: Path) -> None:
    gguf = replace(LAYOUT, engine="ggml", lm_head_bytes=GB // 2)
    for variant in (gguf, gguf.without_lm_head()):
        (stage,) = stages(Network(), [Span(FLEET[1], 8, 10, variant)])
        known = Measurements.record(
            "llama", [stage], TokenTimes((stage.seconds_per_token,)), tmp_path
        )

        slowdowns = {
            m.name: m.engines["ggml"].slowdown for m in known.calibrated(FLEET, "llama", gguf)
        }

        assert slowdowns["bob"] == pytest.approx(1.0)


def test_another_model_on_the_same_machine_is_still_predicted(tmp_path: Path) -> None:
    known = Measurements.record("llama", ring((0, 5)), TokenTimes((0.125,)), tmp_path)

    speeds = [m.engines["mlx"] for m in known.calibrated(FLEET, "gemma", LAYOUT)]
    assert [(s.slowdown, s.measured) for s in speeds] == [(1, False)] * 2


def test_a_machine_not_tried_yet_is_taken_to_be_off_by_as_much(tmp_path: Path) -> None:
    known = Measurements.record("llama", ring((0, 5)), TokenTimes((0.125,)), tmp_path)

    ann, bob = (m.engines["mlx"] for m in known.calibrated(FLEET, "llama", LAYOUT))

    assert ann.slowdown == bob.slowdown > 1.5
    assert (ann.measured, bob.measured) == (True, False)


def test_measurements_of_another_program_are_not_lost(tmp_path: Path) -> None:
    Measurements.record("llama", ring((0, 5)), TokenTimes((0.125,)), tmp_path)
    Measurements.record("gemma", ring((0, 2)), TokenTimes((0.1,)), tmp_path)

    assert set(Measurements.load(tmp_path).stages["ann"]) == {"llama", "gemma"}


def test_a_damaged_file_counts_for_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "measured.json").write_text("{")

    assert Measurements.load(tmp_path).stages == {}
    assert "damaged" in caplog.text
