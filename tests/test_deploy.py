"""The services and the playbook: what can be proven without installing them."""

import os
import plistlib
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from unicluster.trust import Store

ROOT = Path(__file__).parent.parent
UNITS = ROOT / "deploy" / "systemd"
PLIST = ROOT / "deploy" / "launchd" / "unicluster.agent.plist"
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
        timeout=240,
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
            rest, _ = service.communicate(timeout=20)
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
        ANSIBLE / "roles" / "agent" / "tasks" / "token.yml",
    ],
    ids=lambda file: file.name,
)
def test_all_look_for_the_token_where_join_keeps_it(file: Path) -> None:
    assert str(Store(Path(STATE)).path) in file.read_text()


def test_the_role_installs_what_deploy_holds() -> None:
    for file in (ANSIBLE / "roles" / "agent" / "files").iterdir():
        assert file.resolve(strict=True).is_relative_to(ROOT / "deploy"), file


@needs("ansible-playbook")
def test_the_playbook_has_no_syntax_errors(tmp_path: Path) -> None:
    checked = run(
        *("ansible-playbook", "--syntax-check", "-i", "inventory.example.yml", "site.yml"),
        cwd=ANSIBLE,
        env={**os.environ, "ANSIBLE_HOME": str(tmp_path)},
    )

    assert checked.returncode == 0, checked.stdout


@needs("ansible-lint")
def test_ansible_lint_is_content(tmp_path: Path) -> None:
    linted = run(
        *("ansible-lint", "--nocolor"),
        cwd=ANSIBLE,
        env={**os.environ, "ANSIBLE_HOME": str(tmp_path)},
    )

    assert linted.returncode == 0, linted.stdout
