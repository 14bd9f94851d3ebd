"""One host: a tree booted with systemd, reached over ssh."""

import contextlib
import shutil
import subprocess
from pathlib import Path

import psutil

from tests.fleet.cgroup import ControlGroup
from tests.fleet.network import Network
from tests.fleet.tree import copy_tree
from tests.support.cluster import until

BOOT_SECONDS = 120.0
# systemd-nspawn's way to say that the host asked to be started again.
REBOOT = 133


class Host:
    """A machine with a power button and a cable."""

    def __init__(self, name: str, network: Network, folder: Path, key: Path) -> None:
        """`key` is the private ssh key that the controller uses."""
        self.name = name
        self.tree = folder / name
        self.address = network.plug(name)
        self._network = network
        self._key = key
        self._log = (folder / f"{name}.console").open("ab")
        self._machine: subprocess.Popen[bytes] | None = None
        self._group: ControlGroup | None = None
        copy_tree(self.tree)
        self._personalise()

    def boot(self) -> None:
        """Returns when ssh answers and systemd has started everything."""
        self._start()
        try:
            answering = f"{self.name} answers"
            until(lambda: self.try_run("true").returncode == 0, answering, BOOT_SECONDS)
            self.wait_until_started()
        except AssertionError as error:
            said = Path(self._log.name).read_text(errors="replace")
            raise AssertionError(f"{error}; on its console:\n{said[-3000:]}") from None

    def wait_until_started(self) -> None:
        states = "running", "degraded"
        what = f"{self.name} has started all its services"
        ask = "systemctl is-system-running"
        until(lambda: self.try_run(ask).stdout.strip() in states, what, BOOT_SECONDS)

    def reboot(self) -> None:
        """As an administrator would; returns when it is up again."""
        machine = self._machine
        assert machine is not None
        self.try_run("sudo systemctl reboot")
        assert machine.wait(BOOT_SECONDS) == REBOOT, f"{self.name} did not reboot"
        self._ended()
        self.boot()

    def lose_power(self) -> None:
        """All at once: nothing says goodbye, and no connection is closed."""
        self.unplug()
        self._kill()

    def regain_power(self) -> None:
        self.plug_in()
        self.boot()

    def unplug(self) -> None:
        """Pulls its cable."""
        self._network.link(self.name, "down")

    def plug_in(self) -> None:
        self._network.link(self.name, "up")

    def run(self, command: str, deadline: float = 120) -> str:
        """Standard output of a shell command. AssertionError if it fails."""
        done = self.try_run(command, deadline)
        assert done.returncode == 0, (
            f"{self.name}: {command} failed ({done.returncode}):\n{done.stdout}{done.stderr}"
        )
        return done.stdout

    def try_run(self, command: str, deadline: float = 120) -> subprocess.CompletedProcess[str]:
        with self.start(command) as process:
            try:
                out, err = process.communicate(timeout=deadline)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
        return subprocess.CompletedProcess(command, process.returncode, out, err)

    def start(self, command: str) -> "subprocess.Popen[str]":
        """Starts a shell command, without waiting for its end."""
        return subprocess.Popen(
            self._network.inside("ssh", *self.ssh_options, f"admin@{self.address}", command),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    @property
    def ssh_options(self) -> list[str]:
        settings = {
            "IdentityFile": str(self._key),
            "IdentitiesOnly": "yes",
            "StrictHostKeyChecking": "no",  # made a minute ago, and gone in twenty
            "UserKnownHostsFile": "/dev/null",
            "LogLevel": "ERROR",
            "ConnectTimeout": "5",
            "ServerAliveInterval": "5",
            "ServerAliveCountMax": "6",
        }
        return [word for name, value in settings.items() for word in ("-o", f"{name}={value}")]

    def remove(self) -> None:
        """Ends it, and deletes all that it had."""
        self._kill()
        self._log.close()
        shutil.rmtree(self.tree, ignore_errors=True)

    def _personalise(self) -> None:
        etc = self.tree / "etc"
        (etc / "hostname").write_text(f"{self.name}\n")
        (etc / "hosts").write_text(f"127.0.0.1 localhost {self.name}\n")
        keys = self.tree / "home/admin/.ssh/authorized_keys"
        keys.write_text(self._key.with_suffix(".pub").read_text())
        keys.chmod(0o644)
        subprocess.run(["chroot", str(self.tree), "ssh-keygen", "-A"], check=True, timeout=60)

    def _start(self) -> None:
        namespace = f"/run/netns/{self._network.namespace(self.name)}"
        self._group = ControlGroup(self._network.namespace(self.name))
        self._machine = subprocess.Popen(
            self._group.inside(
                *("systemd-nspawn", "--quiet", "--register=no", "--keep-unit", "--boot"),
                *("--machine", self.name, "-D", str(self.tree)),
                *(f"--network-namespace-path={namespace}", "--capability=CAP_NET_ADMIN"),
                *("--resolv-conf=off", "--timezone=off", "--console=pipe"),
            ),
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
        )

    def _kill(self) -> None:
        """Ends the host's first process, and with it the kernel ends all others."""
        if self._machine is None:
            return
        with contextlib.suppress(psutil.NoSuchProcess):
            for init in psutil.Process(self._machine.pid).children():
                init.kill()
        self._machine.wait(30)
        self._ended()

    def _ended(self) -> None:
        if self._group is not None:
            self._group.remove()
        self._machine = self._group = None
