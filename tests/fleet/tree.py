"""The file system that all hosts begin with: made once by debootstrap, kept, and copied."""

import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

SUITE = "bookworm"
MIRROR = os.environ.get("DEBIAN_MIRROR", "http://deb.debian.org/debian")
CACHE = Path(os.environ.get("UNICLUSTER_FLEET_CACHE", "/var/cache/unicluster-fleet"))
# What a plain Debian server has.
PACKAGES = (
    "ca-certificates,dbus,iproute2,openssh-server,procps,python3,python3-apt,python3-venv,sudo,"
    "systemd,systemd-sysv"
)
# The rest can't be configured by debootstrap: firewalls and the broker, which the hosts, without
# internet, can't fetch. None is on until a test turns it on.
SETTINGS = """
set -eu
export DEBIAN_FRONTEND=noninteractive
printf '#!/bin/sh\\nexit 101\\n' > /usr/sbin/policy-rc.d
chmod +x /usr/sbin/policy-rc.d
apt-get -q update
apt-get -q -y install --no-install-recommends firewalld git mosquitto ufw
rm /usr/sbin/policy-rc.d
systemctl disable mosquitto firewalld ufw
apt-get clean
rm -rf /usr/share/doc /usr/share/info /usr/share/locale /usr/share/man /var/lib/apt/lists/*
useradd --create-home --shell /bin/bash admin
echo 'admin ALL=(ALL) NOPASSWD: ALL' > /etc/sudoers.d/admin
install -d -o admin -g admin -m 700 /home/admin/.ssh
rm -f /etc/ssh/ssh_host_*
: > /etc/machine-id
"""
BUILD_SECONDS = 900.0


def base_tree() -> Path:
    """The tree, from the cache or built now. Raises RuntimeError with debootstrap's last lines."""
    key = hashlib.sha256(f"{SUITE} {PACKAGES} {SETTINGS}".encode()).hexdigest()[:12]
    tree = CACHE / f"{SUITE}-{key}"
    if tree.exists():
        return tree
    CACHE.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f"{SUITE}-building-", dir=CACHE))
    try:
        where = (SUITE, str(building), MIRROR)
        _run("debootstrap", "--variant=minbase", f"--include={PACKAGES}", *where)
        _run("chroot", str(building), "/bin/sh", "-c", SETTINGS)
        building.chmod(0o755)
        building.rename(tree)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return tree


def copy_tree(target: Path) -> None:
    """A tree of its own for a host."""
    # An overlay over the base would be quicker, but systemd-sysusers fails in some.
    _run("cp", "-a", "--reflink=auto", str(base_tree()), str(target))


def _run(*command: str) -> None:
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=BUILD_SECONDS
    )
    if done.returncode:
        last = "\n".join(done.stdout.splitlines()[-15:])
        raise RuntimeError(f"{command[0]} failed:\n{last}")
