"""Sleep of a machine, as logind announces it over a real D-Bus."""

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from jeepney import message_bus
from jeepney.io.blocking import Proxy

from node.power import logind as power
from tests.support.cluster import until
from tests.support.deadlines import scaled
from tests.support.logind import DAEMON, Bus, Logind, logind, prepare_for_sleep

pytestmark = pytest.mark.skipif(DAEMON is None, reason="apt-get install dbus-daemon")


class Agent:
    """An agent as the following sees it."""

    def __init__(self) -> None:
        self.told: list[bool] = []
        self.keeps_awake = False
        self.hears = threading.Event()
        self.hears.set()

    def tell(self, asleep: bool) -> None:
        self.told.append(asleep)
        self.hears.wait()


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Bus, Logind]]:
    with logind(tmp_path) as (bus, manager):
        for name, value in bus.environment.items():
            monkeypatch.setenv(name, value)
        yield bus, manager


@pytest.fixture
def agent(system: tuple[Bus, Logind]) -> Iterator[Agent]:
    """It is followed for, and ready for sleep."""
    agent, stop = Agent(), threading.Event()
    arguments = agent.tell, lambda: agent.keeps_awake, stop, 0.1
    thread = threading.Thread(target=power.follow, args=arguments, daemon=True)
    thread.start()
    until(lambda: system[1].held("sleep", "delay"), "sleep waits for the agent")
    yield agent
    agent.hears.set()
    stop.set()
    thread.join(scaled(60))
    assert not thread.is_alive()


def test_sleep_waits_until_the_agent_has_told(system: tuple[Bus, Logind], agent: Agent) -> None:
    manager = system[1]
    agent.hears.clear()
    manager.announce(True)
    until(lambda: agent.told == [True], "the agent hears of sleep")
    assert manager.held("sleep", "delay")
    agent.hears.set()
    until(lambda: not manager.held("sleep", "delay"), "sleep waits no more")

    manager.announce(False)
    until(lambda: agent.told == [True, False], "the agent hears that it is awake")
    until(lambda: manager.held("sleep", "delay"), "the next sleep waits again")


def test_a_machine_with_stages_does_not_fall_asleep_by_itself(
    system: tuple[Bus, Logind], agent: Agent
) -> None:
    manager = system[1]
    assert not manager.held("idle", "block")
    agent.keeps_awake = True
    until(lambda: len(manager.held("idle", "block")) == 1, "it is kept awake")
    agent.keeps_awake = False
    until(lambda: not manager.held("idle", "block"), "it may sleep")


def test_a_bus_that_is_started_anew_is_used_again(system: tuple[Bus, Logind], agent: Agent) -> None:
    bus, manager = system
    bus.end()
    manager.close()
    bus.start()
    another = Logind(bus)
    until(lambda: another.held("sleep", "delay"), "sleep waits for the agent again")
    another.announce(True)
    until(lambda: agent.told == [True], "the agent hears of sleep")
    another.close()


def test_locks_of_an_agent_that_ended_are_gone(system: tuple[Bus, Logind]) -> None:
    stop = threading.Event()
    thread = threading.Thread(target=power.follow, args=(print, lambda: True, stop))
    thread.start()
    until(lambda: system[1].held("idle", "block"), "it is kept awake")
    stop.set()
    thread.join(60)
    assert not system[1].held("idle", "block")
    assert not system[1].held("sleep", "delay")


def test_who_is_not_logind_is_not_believed(system: tuple[Bus, Logind], agent: Agent) -> None:
    bus, manager = system
    with bus.connect() as stranger:
        stranger.send(prepare_for_sleep(True, to=manager.follower))
        Proxy(message_bus, stranger).GetId()  # by then it was sent on
        manager.announce(False)
        until(lambda: agent.told, "logind is heard")

    assert agent.told == [False]


@pytest.mark.parametrize("address", ["unix:path=/nowhere/bus", "nonsense"])
def test_where_no_bus_is_the_agent_goes_on(
    address: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", address)
    caplog.set_level("INFO")
    stop, tries = threading.Event(), iter(range(3))

    class Stop(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            if next(tries, None) is None:
                stop.set()
            return stop.is_set()

        def is_set(self) -> bool:
            return stop.is_set()

    power.follow(print, lambda: False, Stop())

    said = [line for line in caplog.messages if "sleep is known afterwards only" in line]
    assert len(said) == 1
    assert os.environ["DBUS_SYSTEM_BUS_ADDRESS"] == address
