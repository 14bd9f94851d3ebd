"""`unicluster token show|client|rotate|cert`."""

import sys
from pathlib import Path

import click

from unicluster.access.token_input import CLIENT_VARIABLE, JOIN_VARIABLE
from unicluster.cluster.trust import SERVER_NAME, YEAR, Cluster, Store
from unicluster.command_line import Argument, Command, CommandGroup
from unicluster.errors import InputError

SCRAPER = "scraper"


def show() -> int:
    print(Store().require().token)
    print(f"Another machine joins with it in {JOIN_VARIABLE}: `unicluster join`", file=sys.stderr)
    return 0


def client() -> int:
    print(Store().require().client_access.token)
    print(
        "It opens chats and nothing else. Whoever gets it runs `unicluster login` and pastes it "
        f"there, or has it in {CLIENT_VARIABLE} or in a file (--token-file).",
        file=sys.stderr,
    )
    return 0


def rotate() -> int:
    cluster = Store().rotate()
    print(cluster.token)
    print(
        "The old token is void here. On every machine of the cluster: stop the agent, then\n"
        f"  {JOIN_VARIABLE}={cluster.token} unicluster join --replace"
    )
    return 0


def cert(folder: str) -> int:
    _write_certificate(Store().require(), Path(folder))
    return 0


def _write_certificate(cluster: Cluster, folder: Path) -> None:
    """ca.pem, cert.pem and key.pem, for a year. Raises InputError when they can't be written."""
    identity = cluster.scrapers.issue(SCRAPER, YEAR, cluster.ca_pem)
    files = {"ca.pem": cluster.ca_pem, "cert.pem": identity.cert_pem, "key.pem": identity.key_pem}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            path = folder / name
            path.unlink(missing_ok=True)
            path.touch(mode=0o600 if name == "key.pem" else 0o644)
            path.write_text(content)
    except OSError as error:
        raise InputError(f"{folder} can't be written to: {error.strerror}") from error
    where = folder.absolute()
    print(
        "Good for a year, and for metrics only. In prometheus.yml:\n"
        "  - job_name: unicluster\n"
        "    scheme: https\n"
        "    tls_config:\n"
        f"      ca_file: {where / 'ca.pem'}\n"
        f"      cert_file: {where / 'cert.pem'}\n"
        f"      key_file: {where / 'key.pem'}\n"
        f"      server_name: {SERVER_NAME}\n"
        "    static_configs:\n"
        '      - targets: ["HOST:PORT"]  # where serve runs, and its --metrics-port'
    )


command = CommandGroup(
    [
        Command(show, name="show", summary="Print the join token."),
        Command(client, name="client", summary="Print a token that opens chats and no more."),
        Command(rotate, name="rotate", summary="Make a new one; machines must join again."),
        Command(
            cert,
            name="cert",
            summary="Write a certificate for Prometheus, good for metrics only.",
            arguments=[
                Argument("folder", "where its files are written", metavar="DIR", type=click.Path())
            ],
        ),
    ],
    examples=[
        "unicluster token show",
        "unicluster token cert /etc/prometheus/unicluster",
    ],
)
