"""The life of a fleet, in order: each test begins where the one before has ended.

Three Debian hosts without internet; the playbook, over ssh, is all that is done to them.
"""

import json
import re
import shlex
from pathlib import Path

import pytest

from tests.fleet.answers import FAILPOINTS, STORY, running_answer, slowed, unslow
from tests.fleet.conftest import build_wheel
from tests.fleet.fleet import NAMES, UNICLUSTER, Fleet
from tests.support.brokers import COORDINATOR
from tests.support.cluster import ROOT, until
from unicluster import failpoints
from unicluster.trust.cluster import Cluster

QUESTION, ANSWER = "'What is the capital of Spain?'", "The capital of Spain is Madrid."
# To plan again and to load, on hosts that share two cores.
MOVE_SECONDS = 180.0


PROGRAM = "/opt/unicluster/bin/unicluster"
METRICS_PORT = 9470
# Stages outlive a coordinator whose host boots on a busy machine.
GRACE_SECONDS = 300
CERTIFICATE = "/var/lib/unicluster/prometheus"
# What Prometheus does.
SCRAPE = f"""
import ssl, urllib.request
context = ssl.create_default_context(cafile="{CERTIFICATE}/ca.pem")
context.check_hostname = False
context.load_cert_chain("{CERTIFICATE}/cert.pem", "{CERTIFICATE}/key.pem")
url = "https://127.0.0.1:{METRICS_PORT}/metrics"
print(urllib.request.urlopen(url, context=context).read().decode())
"""


def machines_of(fleet: Fleet, host: str) -> set[str]:
    """Which machines `unicluster nodes` lists on a host."""
    return set(re.findall(r"^(ann|bob|cid)\b", fleet.unicluster(host, "nodes"), re.M))


def stages(fleet: Fleet) -> set[str]:
    """The hosts over which the model is spread."""
    told = json.loads(fleet.unicluster("ann", "status", "--json"))
    return {stage["machine"] for stage in told["stages"]}


def workers(fleet: Fleet, host: str) -> list[str]:
    """Process ids of a host's workers that listen: those with a stage."""
    listening = fleet[host].run("sudo ss -Hltnp")
    return sorted(set(re.findall(r"pid=(\d+)", "".join(re.findall(r".*47601.*", listening)))))


def ask(fleet: Fleet, host: str, question: str = QUESTION) -> str:
    return fleet.unicluster(host, "chat", question).strip()


def ask_until_answered(fleet: Fleet, host: str) -> None:
    def answered() -> bool:
        command = f"{UNICLUSTER} chat {QUESTION}"
        return ANSWER in fleet[host].try_run(command).stdout

    until(answered, f"{host} gets an answer", MOVE_SECONDS)
    fleet.say(host, "an answer again")


@pytest.fixture(scope="module")
def story(fleet: Fleet) -> str:
    """The long answer, when nothing happens meanwhile."""
    return ask(fleet, "ann", STORY)


def test_a_dry_run_on_bare_hosts_changes_nothing(fleet: Fleet) -> None:
    fleet.play("--check", "--diff")

    assert not any(host.try_run("test -e /opt/unicluster").returncode == 0 for host in fleet.each())


def test_the_playbook_makes_a_cluster_behind_closed_firewalls(fleet: Fleet) -> None:
    fleet["ann"].run("sudo systemctl enable --now firewalld")
    fleet["bob"].run("sudo ufw allow ssh && sudo ufw --force enable")
    options = ["--context", "1024", "--metrics-port", str(METRICS_PORT)]
    options += ["--orphan-grace", str(GRACE_SECONDS)]
    fleet.models = [{"name": "demo", "model": "demo", "options": options}]
    # There is no such broker yet: nothing may depend on it.
    fleet.variables |= {
        "agent_secrets": {
            "UNICLUSTER_MQTT": fleet.broker.url("{{ inventory_hostname }}"),
            failpoints.VARIABLE: f"@{FAILPOINTS}",
        },
        "coordinator_secrets": {"UNICLUSTER_MQTT": fleet.broker.url(COORDINATOR)},
    }

    fleet.play()

    assert all(machines_of(fleet, name) == set(NAMES) for name in NAMES)


def test_a_model_that_no_host_can_hold_answers_on_all(fleet: Fleet) -> None:
    assert len(stages(fleet)) >= 2
    assert {name: ask(fleet, name) for name in NAMES} == dict.fromkeys(NAMES, ANSWER)


def test_a_second_run_changes_nothing(fleet: Fleet) -> None:
    again = fleet.play()
    dry = fleet.play("--check", "--diff")

    assert (again.tasks_changed(), dry.tasks_changed()) == ([], [])


def test_services_are_hardened_and_say_when_they_are_ready(fleet: Fleet) -> None:
    for unit, highest in (("unicluster-agent", 2.1), ("unicluster-serve@demo", 1.5)):
        said = fleet["ann"].run(f"systemd-analyze security --no-pager {unit} | tail -1")
        score = float(re.search(r"(\d+\.\d+)", said)[1])  # type: ignore[index]
        status = fleet["ann"].run(f"systemctl show -p StatusText --value {unit}")
        fleet.say("ann", f"{unit}: exposure {score}, {status.strip()}")
        assert score <= highest
        assert status.strip()


def test_metrics_are_told_to_whoever_has_a_certificate_for_them(fleet: Fleet) -> None:
    fleet.unicluster("ann", "token", "cert", CERTIFICATE)
    python = "sudo -u unicluster /opt/unicluster/bin/python -c"

    without = "\n".join(line for line in SCRAPE.splitlines() if "cert_chain" not in line)

    metrics = fleet["ann"].run(f"{python} {shlex.quote(SCRAPE)}")
    stranger = fleet["ann"].try_run(f"{python} {shlex.quote(without)}")

    generated = re.search(r"^unicluster_generated_tokens_total\S* (\S+)$", metrics, re.M)
    assert generated is not None
    fleet.say("ann", f"metrics: {generated[0]}")
    assert float(generated[1]) > 0
    assert all(f'machine="{name}"' in metrics for name in stages(fleet))
    # The connection may be closed before its reason is read.
    assert re.search("CERTIFICATE_REQUIRED|EOF occurred|reset by peer", stranger.stderr)
    assert stranger.returncode != 0
    assert "unicluster_" not in stranger.stdout


def test_machines_and_models_tell_a_real_broker_how_they_are(fleet: Fleet) -> None:
    token = fleet["ann"].run("sudo cat /var/lib/unicluster/cluster.token").strip()
    fleet.broker.install(Cluster.from_token(token), NAMES)

    machines = {f"node/{name}/status": "online" for name in NAMES}
    topics = fleet.broker.hear({**machines, "model/demo/state": "", "node/ann/readings": ""})

    fleet.say("ann", f"mosquitto: {topics['model/demo/state']}")
    assert topics["model/demo/state"]["state"] == "ready"
    assert topics["node/ann/readings"]["usable_memory"] >= 0


def test_the_doctor_finds_nothing_that_would_not_work(fleet: Fleet) -> None:
    said = fleet.unicluster("bob", "doctor")

    assert "heard ann, bob, cid" in said
    assert "✗" not in said


def test_an_answer_goes_on_when_a_host_loses_power(fleet: Fleet, story: str) -> None:
    victim = next(name for name in ("cid", "bob") if name in stages(fleet))
    with slowed(fleet, 100), running_answer(fleet, "ann") as answer:
        fleet[victim].lose_power()
        fleet.say(victim, "lost power")
        text = answer.whole()

    assert text == story
    fleet.broker.hear({f"node/{victim}/status": "offline"})
    fleet.say("ann", f"mosquitto: {victim} is offline")
    assert victim not in stages(fleet)
    fleet[victim].regain_power()
    fleet.say(victim, "has power again")
    until(lambda: machines_of(fleet, "ann") == set(NAMES), "all are back", MOVE_SECONDS)


def test_an_answer_goes_on_over_a_partition_that_heals(fleet: Fleet, story: str) -> None:
    victim = next(name for name in ("bob", "cid") if name in stages(fleet))
    with slowed(fleet, 250), running_answer(fleet, "ann") as answer:
        fleet[victim].unplug()
        fleet.say(victim, "its cable is pulled")
        until(lambda: victim not in stages(fleet), f"{victim} is done without", MOVE_SECONDS)
        fleet[victim].plug_in()
        fleet.say(victim, "its cable is in again")
        text = answer.whole()

    assert text == story
    until(lambda: machines_of(fleet, "ann") == set(NAMES), "all are back", MOVE_SECONDS)
    # It is used as soon as it is needed: without ann, the model fits only with it.
    fleet.unicluster("ann", "drain", "ann", "--yes", deadline=MOVE_SECONDS)
    ask_until_answered(fleet, "bob")
    assert stages(fleet) == {"bob", "cid"}


def test_the_coordinators_host_reboots_under_an_answer(fleet: Fleet, story: str) -> None:
    before = {name: workers(fleet, name) for name in ("bob", "cid")}
    with slowed(fleet, 250), running_answer(fleet, "bob") as answer:
        fleet["ann"].reboot()
        fleet.say("ann", "rebooted")
        text = answer.whole()

    assert text == story
    # Nothing was loaded again, and what was drained still is.
    assert {name: workers(fleet, name) for name in before} == before
    events = [json.loads(e) for e in fleet.unicluster("ann", "events", "--json").splitlines()]
    began = max(n for n, event in enumerate(events) if event["kind"] == "left")
    adopted = [event["machine"] for event in events[began:] if event["kind"] == "adopted"]
    assert sorted(adopted) == ["bob", "cid"]
    assert stages(fleet) == {"bob", "cid"}
    fleet.unicluster("ann", "drain", "--undo")
    assert machines_of(fleet, "bob") == set(NAMES)


def test_agents_are_upgraded_one_by_one_while_the_model_answers(
    fleet: Fleet, story: str, tmp_path: Path
) -> None:
    source = tmp_path / "newer"
    source.mkdir()
    newer = build_wheel(source, ROOT, version="0.1.1")
    fleet.wheel = newer
    fleet.variables["agent_drain_seconds"] = 10  # the long answer is to run on over it
    asking = "; ".join(
        [f"until {PROGRAM} chat {QUESTION}; do sleep 1; done", "sleep 1"],
    )
    script = f"while true; do {asking}; done"
    clients = fleet["ann"].start(
        f'sudo -u unicluster UNICLUSTER_HOME=/var/lib/unicluster timeout 1800 sh -c "{script}"'
    )
    try:
        with slowed(fleet, 800), running_answer(fleet, "cid") as answer:
            play = fleet.play()
            fleet.say("cid", f"the answer {'still runs' if answer.runs else 'has ended'}")
            unslow(fleet)
            text = answer.whole()
    finally:
        fleet["ann"].try_run("sudo pkill -u unicluster timeout")
        out, err = clients.communicate(timeout=60)
    fleet.say("ann", f"{out.count(ANSWER)} answers meanwhile, {len(err.splitlines())} refusals")

    assert text == story
    assert [c for c in play.tasks_changed() if c.startswith("agent : Drain")]
    assert all("0.1.1" in fleet[n].run(f"{PROGRAM} --version") for n in NAMES)
    ask_until_answered(fleet, "cid")


def test_uninstalling_leaves_nothing(fleet: Fleet) -> None:
    fleet.play(book="uninstall.yml")

    left = (
        "ls -d /opt/unicluster /etc/unicluster /var/lib/unicluster /etc/systemd/system/unicluster*"
    )
    for host in fleet.each():
        assert host.try_run(left).stdout == ""
        assert "47600" not in host.run("sudo ss -ltn")
