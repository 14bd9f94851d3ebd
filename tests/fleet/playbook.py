"""The playbook as an administrator runs it: ansible-playbook over ssh, from beside the hosts."""

import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.fleet.host import Host
from tests.fleet.network import Network
from tests.support.cluster import ROOT

PLAY_SECONDS = 900.0
_RECAP = re.compile(r"^(\S+)\s*: ok=(\d+)\s+changed=(\d+)\s+unreachable=(\d+)\s+failed=(\d+)", re.M)


@dataclass(frozen=True)
class Play:
    """Result of a run of the playbook."""

    output: str
    changed: dict[str, int]  # by host

    def tasks_changed(self) -> list[str]:
        """`task: host` of each change, in order."""
        changed, task = [], ""
        for line in self.output.splitlines():
            if match := re.match(r"(?:TASK|RUNNING HANDLER) \[(.+)\]", line):
                task = match[1]
            elif match := re.match(r"changed: \[([^\]\s]+)", line):
                changed.append(f"{task}: {match[1]}")
        return changed


class Playbook:
    """ansible/site.yml, with an inventory of these hosts."""

    def __init__(self, hosts: Sequence[Host], network: Network, folder: Path) -> None:
        self._hosts = hosts
        self._folder = folder
        # Ansible itself stays outside, where the package index is; only ssh is on the LAN.
        self._ssh = folder / "ssh"
        self._ssh.write_text(f'#!/bin/sh\nexec {" ".join(network.inside("ssh"))} "$@"\n')
        self._ssh.chmod(0o755)

    def run(
        self,
        variables: Mapping[str, Any],
        *arguments: str,
        host_variables: Mapping[str, Mapping[str, Any]] | None = None,
        coordinators: Sequence[str] = (),
        book: str = "site.yml",
    ) -> Play:
        """AssertionError with the end of the output if a host failed."""
        inventory = self._folder / "inventory.yml"
        of_hosts = host_variables or {}
        inventory.write_text(
            yaml.safe_dump(
                {
                    "all": {
                        "vars": {
                            "ansible_user": "admin",
                            "ansible_ssh_executable": str(self._ssh),
                            "ansible_ssh_transfer_method": "piped",
                            "ansible_ssh_common_args": " ".join(self._hosts[0].ssh_options),
                            "ansible_python_interpreter": "/usr/bin/python3",
                            **variables,
                        }
                    },
                    "agents": {
                        "hosts": {
                            host.name: {"ansible_host": host.address, **of_hosts.get(host.name, {})}
                            for host in self._hosts
                        }
                    },
                    "coordinators": {"hosts": {name: {} for name in coordinators}},
                }
            )
        )
        inventory.chmod(0o600)
        done = subprocess.run(
            [Path(sys.executable).with_name("ansible-playbook"), "-i", inventory, book, *arguments],
            cwd=ROOT / "ansible",
            env={
                **os.environ,
                "ANSIBLE_HOME": str(self._folder / "ansible"),
                "ANSIBLE_PIPELINING": "1",
                "ANSIBLE_SSH_ARGS": "-o ControlMaster=auto -o ControlPersist=60s",  # without -C
                # Not the user's own: a later run may have other hosts at these addresses.
                "ANSIBLE_SSH_CONTROL_PATH_DIR": str(self._folder / "cp"),
                "ANSIBLE_NOCOLOR": "1",
                "ANSIBLE_FORKS": "4",
            },
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=PLAY_SECONDS,
        )
        fatal = "\n".join(re.findall(r"^(?:fatal|failed): .+", done.stdout, re.M))
        assert done.returncode == 0, f"the playbook failed:\n{done.stdout[-3000:]}\n{fatal}"
        recap = {m[1]: int(m[3]) for m in _RECAP.finditer(done.stdout)}
        return Play(done.stdout, {h.name: recap[h.name] for h in self._hosts if h.name in recap})
