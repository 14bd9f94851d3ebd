"""`unicluster token show|client|ca|rotate|cert`."""

import asyncio
import sys
from collections.abc import Iterable
from pathlib import Path

import click

from unicluster.access import rotation
from unicluster.access.token_input import CLIENT_VARIABLE, JOIN_VARIABLE
from unicluster.cluster.known_machines import peer_option
from unicluster.command_line import Argument, Command, CommandGroup, Option
from unicluster.errors import InputError
from unicluster.trust.cluster import Cluster
from unicluster.trust.identity import SERVER_NAME, YEAR
from unicluster.trust.store import Store

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


def authority() -> int:
    certificates = Store().authorities()
    print("".join(certificates), end="")
    print(
        "Public. Clients know `serve --http-cert cluster` by it: curl --cacert FILE, "
        "SSL_CERT_FILE=FILE, NODE_EXTRA_CA_CERTS=FILE.",
        file=sys.stderr,
    )
    return 0


def rotate(yes: bool, finish: bool, force: bool, peer: tuple[str, ...]) -> int:
    store = Store()
    if force and not finish:
        raise InputError("--force: only with --finish")
    cluster = store.require()
    if finish:
        asked = asyncio.run(rotation.finish(store, peer, force=force))
        _print_silent(asked)
        print("The old token is void, and so are client tokens and certificates made of it.")
        return 0
    if not yes:
        click.confirm(
            f"Make a new token for cluster {cluster.fingerprint}? All machines that answer get it; "
            "the old one is good until --finish.",
            abort=True,
        )
    asked = asyncio.run(rotation.start(store, peer))
    print(store.require().token)
    moved = [each for each in asked if each.error is None]
    print(f"{len(moved)} machines have it; both tokens are good, and nothing was interrupted.")
    _print_silent(asked)
    print(
        "A machine that has it not:\n"
        f"  {JOIN_VARIABLE}={store.require().token} unicluster join --replace\n"
        "Whoever has a client token needs another (`unicluster token client`), and Prometheus "
        "another certificate (`unicluster token cert`). Then end the old token:\n"
        "  unicluster token rotate --finish"
    )
    return 0


def _print_silent(asked: Iterable[rotation.Asked]) -> None:
    for each in asked:
        if each.error is not None:
            print(f"{each}: {each.error}")


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
        Command(
            authority,
            name="ca",
            summary="Print the certificate by which clients of HTTPS know the cluster.",
        ),
        Command(
            rotate,
            name="rotate",
            summary="Replace it by a new one, in two steps and without an outage.",
            sections={
                "Rotation": [
                    Option("--yes", "don't ask", is_flag=True),
                    Option("--finish", "second step: end the old token", is_flag=True),
                    Option(
                        "--force",
                        "finish although machines have not got the new token",
                        is_flag=True,
                    ),
                    peer_option("an agent that multicast does not reach"),
                ]
            },
        ),
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
