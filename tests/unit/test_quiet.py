"""The memory's bandwidth, measured again when the machine is quiet."""

from pathlib import Path

import pytest

from node.agent.ledger import Ledger
from node.agent.probe import Hardware
from node.agent.quiet import AGAIN_SECONDS, QuietMeasuring
from tests.support.hosts import commands, linux, look, strix_halo

RATE = 50e9


@pytest.fixture
def hardware(tmp_path: Path) -> Hardware:
    found = look(linux(tmp_path, "Some CPU of nobody"), commands("cpu"))
    assert found.bandwidth_measured
    return found.with_measured(RATE)


def test_it_is_measured_when_nobody_uses_the_machine(hardware: Hardware) -> None:
    quiet = QuietMeasuring(spread=10.0)

    assert not quiet.due(hardware, 0.0, 1.0, stages=False)  # others have just started too
    assert not quiet.due(hardware, 11.0, 90.0, stages=False)
    assert not quiet.due(hardware, 12.0, 1.0, stages=True)
    assert quiet.due(hardware, 13.0, 1.0, stages=False)
    assert not quiet.due(hardware, 13.0 + AGAIN_SECONDS, 1.0, stages=False)
    assert quiet.due(hardware, 24.0 + AGAIN_SECONDS, 1.0, stages=False)


def test_what_a_maker_states_is_not_measured(tmp_path: Path) -> None:
    assert not QuietMeasuring(spread=0.0).due(
        look(strix_halo(tmp_path), commands("rocm")), 0.0, 0.0, stages=False
    )


@pytest.mark.parametrize(("measured", "then"), [(1.5 * RATE, 1.5 * RATE), (1.01 * RATE, RATE)])
def test_a_noticeable_change_is_taken_over(
    hardware: Hardware, measured: float, then: float
) -> None:
    quiet = QuietMeasuring(measure=lambda free: measured)

    found = quiet.measured(hardware)

    assert found.bandwidth == then
    assert [device.bandwidth for device in found.devices] == [then] * len(hardware.devices)
    assert found.ggml_bandwidth in (0.0, then)


def test_memory_is_accounted_as_before(hardware: Hardware) -> None:
    ledger = Ledger(hardware, None)
    before = ledger.hardware.available()

    ledger.hardware = hardware.with_measured(2 * RATE)

    assert ledger.hardware.devices[0].bandwidth == 2 * RATE
    assert ledger.hardware.available() == before
