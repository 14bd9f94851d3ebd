"""The services and the playbook: what can be proven without installing them."""

import json
import os
import plistlib
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.cluster import DEADLINE, LocalCluster
from tests.support.deadlines import scaled
from unicluster.trust.store import Store

ROOT = Path(__file__).parents[2]
UNITS = ROOT / "deploy" / "systemd"
LAUNCHD = ROOT / "deploy" / "launchd"
PLIST = LAUNCHD / "unicluster.agent.plist"
ANSIBLE = ROOT / "ansible"
INSTALLED = "/opt/unicluster/bin/unicluster"
STATE = "/var/lib/unicluster"


def needs(program: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(shutil.which(program) is None, reason=f"{program} is not installed")


def run(*command: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=scaled(600),
        **options,
    )


@pytest.fixture
def launched(tmp_path: Path) -> list[str]:
    """The command of the launchd service, with this checkout and a settings file in its place."""
    home = tmp_path / "home"
    settings = tmp_path / "agent.env"
    settings.write_text(
        'UNICLUSTER_JOIN_OPTIONS="--name from-settings --port 0 --host 127.0.0.1"\n'
    )
    *shell, script = plistlib.loads(PLIST.read_bytes())["ProgramArguments"]
    script = script.replace(INSTALLED, f"{sys.executable} -m unicluster")
    script = script.replace("/etc/unicluster/agent.env", str(settings))
    script = script.replace("/etc/unicluster/agent-secrets.env", str(tmp_path / "secrets.env"))
    return ["env", f"UNICLUSTER_HOME={home}", f"PYTHONPATH={ROOT}", *shell, script]


@needs("systemd-analyze")
@pytest.mark.parametrize("unit", ["unicluster-agent.service", "unicluster-serve@.service"])
def test_systemd_accepts_the_units(unit: str, tmp_path: Path) -> None:
    # Nothing is installed here, so a program that exists stands for ours.
    copy = tmp_path / unit.replace("@", "@demo")
    copy.write_text((UNITS / unit).read_text().replace(INSTALLED, "/usr/bin/env"))

    verified = run("systemd-analyze", "verify", str(copy))

    assert (verified.returncode, verified.stdout) == (0, "")


@needs("systemd-analyze")
def test_no_device_policy_takes_the_gpu_from_the_agent(tmp_path: Path) -> None:
    unit = shutil.copy(UNITS / "unicluster-agent.service", tmp_path)

    exposed = run("systemd-analyze", "security", "--offline=true", "--no-pager", str(unit)).stdout

    # ProtectClock and others set a policy without a word of it in their names.
    assert "Service has no device ACL" in exposed


def test_the_plist_runs_join_as_a_user_of_its_own() -> None:
    service = plistlib.loads(PLIST.read_bytes())

    assert service["Label"] == PLIST.stem
    assert service["UserName"] == "_unicluster"
    assert service["EnvironmentVariables"]["UNICLUSTER_HOME"] == STATE
    assert service["KeepAlive"] == {"SuccessfulExit": False}
    assert f"exec {INSTALLED} join" in service["ProgramArguments"][-1]


def test_the_launchd_command_joins_with_its_settings_and_leaves(
    launched: list[str], tmp_path: Path
) -> None:
    Store(tmp_path / "home").create()

    with subprocess.Popen(launched, stdout=subprocess.PIPE, text=True) as service:
        assert service.stdout is not None
        try:
            greeting = service.stdout.readline()
            service.terminate()
            rest, _ = service.communicate(timeout=scaled(20))
        finally:
            service.kill()

    assert greeting.startswith("from-settings is in cluster ")
    assert rest.endswith("from-settings has left the cluster.\n")
    assert service.returncode == 0


def test_the_launchd_command_founds_no_cluster(launched: list[str], tmp_path: Path) -> None:
    refused = run(*launched)

    assert refused.returncode == 1
    assert "no join token" in refused.stdout
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize(
    "file",
    [
        UNITS / "unicluster-agent.service",
        UNITS / "unicluster-serve@.service",
        ANSIBLE / "roles" / "cluster" / "tasks" / "main.yml",
    ],
    ids=lambda file: file.name,
)
def test_all_look_for_the_token_where_join_keeps_it(file: Path) -> None:
    assert str(Store(Path(STATE)).path) in file.read_text()


def test_the_roles_install_what_deploy_holds() -> None:
    for file in (ANSIBLE / "roles").glob("*/files/*"):
        assert file.resolve(strict=True).is_relative_to(ROOT / "deploy"), file


def test_one_plist_serves_one_model() -> None:
    text = (LAUNCHD / "unicluster.serve.plist").read_text().replace("MODEL", "r1")
    service = plistlib.loads(text.encode())

    assert service["Label"] == "unicluster.serve.r1"
    assert ". /etc/unicluster/serve-r1.env" in service["ProgramArguments"][-1]
    assert f"exec {INSTALLED} serve" in service["ProgramArguments"][-1]
    assert service["UserName"] == "_unicluster"


@pytest.mark.parametrize("unit", ["unicluster-agent.service", "unicluster-serve@.service"])
def test_a_service_says_when_it_is_ready(unit: str) -> None:
    assert "Type=notify\n" in (UNITS / unit).read_text()


def test_the_agent_tells_systemd_that_it_is_ready_and_that_it_stops(tmp_path: Path) -> None:
    path = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(path))
        systemd.settimeout(DEADLINE)
        with LocalCluster(tmp_path / "cluster", NOTIFY_SOCKET=str(path)) as cluster:
            agent = cluster.start_agent("ann")
            ready = systemd.recv(1000).decode()
            agent.end()
        stopping = systemd.recv(1000).decode()

    assert ready.startswith("READY=1\nSTATUS=ann in cluster ")
    assert stopping == "STOPPING=1"


@needs("promtool")
def test_prometheus_accepts_its_configuration() -> None:
    folder = ROOT / "deploy" / "prometheus"

    checked = run("promtool", "check", "config", "--syntax-only", str(folder / "prometheus.yml"))
    rules = run("promtool", "check", "rules", str(folder / "unicluster.rules.yml"))

    assert (checked.returncode, rules.returncode) == (0, 0), checked.stdout + rules.stdout


@needs("docker-compose")
def test_docker_compose_accepts_its_file() -> None:
    file = ROOT / "deploy" / "docker" / "compose.yaml"

    checked = run("docker-compose", "-f", str(file), "config")

    assert checked.returncode == 0, checked.stdout


def test_the_dashboard_asks_the_chosen_prometheus_for_our_metrics() -> None:
    board = json.loads((ROOT / "deploy" / "grafana" / "unicluster.json").read_text())
    panels = board["panels"]

    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        assert panel["datasource"]["uid"] == "${datasource}"
        assert all("unicluster_" in target["expr"] for target in panel["targets"])


@needs("ansible-playbook")
def test_what_macos_gets_from_the_playbook(tmp_path: Path) -> None:
    # No Mac is at hand: its templates are rendered for one, and read back.
    defaults = sorted(str(path) for path in (ANSIBLE / "roles").glob("*/defaults/main.yml"))
    templates = {
        "agent/templates/agent.env.j2": "agent.env",
        "agent/templates/secrets.env.j2": "agent-secrets.env",
        "coordinator/templates/serve.env.j2": "serve-r1.env",
        "host/templates/unicluster.wired-limit.plist.j2": "wired-limit.plist",
    }
    play = {
        "hosts": "localhost",
        "gather_facts": False,
        "vars_files": defaults,
        "tasks": [
            {
                "ansible.builtin.template": {
                    "src": str(ANSIBLE / "roles" / source),
                    "dest": str(tmp_path / target),
                    "mode": "0600",
                }
            }
            for source, target in templates.items()
        ]
        + [
            {
                "ansible.builtin.copy": {
                    "content": "{{ package_python }} {{ package_wheelhouse_also | join(' ') }}",
                    "dest": str(tmp_path / "package"),
                    "mode": "0600",
                }
            }
        ],
    }
    (tmp_path / "play.yml").write_text(yaml.safe_dump([play]))
    mac = {
        "ansible_facts": {"system": "Darwin", "os_family": "Darwin", "architecture": "arm64"},
        "ansible_python_interpreter": sys.executable,
        "host_wired_limit_mb": 458752,
        "agent_options": ["--memory", "400GB"],
        "agent_secrets": {"UNICLUSTER_MQTT": "mqtts://a:b$c@broker"},
        "item": {"name": "r1", "model": "deepseek-r1", "options": ["--quant", "q4"]},
    }

    rendered = run(
        *("ansible-playbook", "-i", "localhost,", "-c", "local", "-e", json.dumps(mac)),
        str(tmp_path / "play.yml"),
        env={**os.environ, "ANSIBLE_HOME": str(tmp_path)},
    )
    assert rendered.returncode == 0, rendered.stdout
    limit = plistlib.loads((tmp_path / "wired-limit.plist").read_bytes())
    # As launchd's shell reads them.
    shell = ". ./agent.env; . ./agent-secrets.env; . ./serve-r1.env; echo "
    words = '"$UNICLUSTER_JOIN_OPTIONS|$UNICLUSTER_MQTT|$UNICLUSTER_SERVE_OPTIONS"'
    read = run("sh", "-euc", shell + words, cwd=tmp_path).stdout.strip()

    assert limit["ProgramArguments"][-1] == "iogpu.wired_limit_mb=458752"
    assert limit["RunAtLoad"] is True
    assert read == (
        "--name localhost --port 47600 --memory 400GB|mqtts://a:b$c@broker|deepseek-r1 --quant q4"
    )
    assert (tmp_path / "package").read_text() == (
        "/opt/homebrew/opt/python@3.12/bin/python3.12 mlx mlx-metal mlx-lm"
    )


@needs("ansible-playbook")
@pytest.mark.parametrize("book", ["site.yml", "uninstall.yml"])
def test_the_playbook_has_no_syntax_errors(book: str, tmp_path: Path) -> None:
    checked = run(
        *("ansible-playbook", "--syntax-check", "-i", "inventory.example.yml", book),
        cwd=ANSIBLE,
        env={**os.environ, "ANSIBLE_HOME": str(tmp_path)},
    )

    assert checked.returncode == 0, checked.stdout


@pytest.mark.sweep
@needs("ansible-lint")
def test_ansible_lint_is_content(tmp_path: Path) -> None:
    linted = run(
        *("ansible-lint", "--nocolor"),
        cwd=ANSIBLE,
        env={**os.environ, "ANSIBLE_HOME": str(tmp_path)},
    )

    assert linted.returncode == 0, linted.stdout
