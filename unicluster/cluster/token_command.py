"""`unicluster token show|rotate|cert`."""

import argparse
from pathlib import Path

from unicluster.cluster.trust import SERVER_NAME, YEAR, Cluster, Store
from unicluster.errors import InputError

SCRAPER = "scraper"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "action",
        choices=("show", "rotate", "cert"),
        help="show: print the join token. rotate: make a new one; machines must join again. "
        "cert: write a certificate for Prometheus, good for metrics only",
    )
    parser.add_argument("dir", nargs="?", metavar="DIR", help="where cert writes its files")


def run(args: argparse.Namespace) -> int:
    if (args.action == "cert") != (args.dir is not None):
        raise InputError("token cert needs a DIR, and nothing else does: `unicluster token --help`")
    store = Store()
    if args.action == "cert":
        _write_certificate(store.require(), Path(args.dir))
    elif args.action == "rotate":
        cluster = store.rotate()
        print(cluster.token)
        print(
            "The old token is void here. On every machine of the cluster: stop the agent, then\n"
            f"  unicluster join --replace --token {cluster.token}"
        )
    else:
        print(store.require().token)
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
