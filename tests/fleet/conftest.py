"""The fleet that the tests of this folder share: it lives through the whole story."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from tests.fleet.fleet import Fleet
from tests.support.cluster import ROOT

PROGRAMS = {
    "systemd-nspawn": "systemd-container",
    "debootstrap": "debootstrap",
    "ip": "iproute2",
    "ssh": "openssh-client",
    "ssh-keygen": "openssh-client",
}


def why_not() -> str:
    """Why no hosts can be made here, in a line; empty if they can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "whole hosts need Linux and root"
    missing = sorted({PROGRAMS[name] for name in PROGRAMS if shutil.which(name) is None})
    if missing:
        return f"apt-get install {' '.join(missing)}"
    tried = subprocess.run(["unshare", "--mount", "--net", "true"], capture_output=True, timeout=30)
    return "root may make no namespaces here" if tried.returncode else ""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Where a chapter fails, what the services said goes with it."""
    report = yield
    fleet = getattr(item, "funcargs", {}).get("fleet")
    if report.failed and fleet is not None:
        for host in fleet.each():
            said = host.try_run("sudo journalctl -u 'unicluster*' -n 60 --no-pager -o cat").stdout
            report.sections.append((f"journal of {host.name}", said))
    return report


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """This checkout as a wheel."""
    return build_wheel(tmp_path_factory.mktemp("wheel"), ROOT)


def build_wheel(folder: Path, source: Path, version: str = "") -> Path:
    """`source` as a wheel, with its own version number or another."""
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder)]
    # Built from a copy: setuptools would leave its folder `build` in the checkout, and reuse it.
    copy = folder / "source"
    names = ["unicluster", "node", "coordinator", "pyproject.toml", "README.md", "LICENSE"]
    copy.mkdir()
    for name in names:
        if (source / name).is_dir():
            shutil.copytree(source / name, copy / name, ignore=shutil.ignore_patterns("*.pyc"))
        else:
            shutil.copy(source / name, copy / name)
    if version:
        for file, pattern in (
            ("unicluster/__init__.py", r'__version__ = ".+"'),
            ("pyproject.toml", r'^version = ".+"'),
        ):
            text = (copy / file).read_text()
            (found,) = re.findall(pattern, text, re.M)
            (copy / file).write_text(text.replace(found, re.sub('".+"', f'"{version}"', found)))
    subprocess.run([*pip, str(copy)], check=True, timeout=300)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="session")
def fleet(wheel: Path) -> Iterator[Fleet]:
    if reason := why_not():
        pytest.skip(reason)
    # Not below pytest's own folder, which is kept: a host's tree takes a gigabyte.
    with (
        tempfile.TemporaryDirectory(prefix="unicluster-fleet-", dir="/var/tmp") as folder,
        Fleet(Path(folder), wheel) as fleet,
    ):
        yield fleet
