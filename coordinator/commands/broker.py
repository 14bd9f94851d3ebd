"""`unicluster broker`: a small MQTT broker for people who have none, with TLS and a password."""

import argparse
import asyncio
import importlib.util
import logging
import signal
import tempfile
from pathlib import Path
from typing import Any

from unicluster.cluster.channels import check_free, join_address
from unicluster.cluster.systemd import notify
from unicluster.cluster.trust import Store, default_name
from unicluster.errors import InputError, UnavailableError
from unicluster.telemetry.broker_url import CLUSTER_USER

DEFAULT_PORT = 8883
CONNECTIONS = 256


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--host", default="", help="address to listen at (default: all)")
    parser.add_argument(
        "--port", type=int, default=DEFAULT_PORT, help=f"default: {DEFAULT_PORT}, always with TLS"
    )
    parser.add_argument(
        "--show-password",
        action="store_true",
        help="print what others, such as Home Assistant, need to come in, and end",
    )


def run(args: argparse.Namespace) -> int:
    cluster = Store().require()
    if args.show_password:
        print(f"user      {CLUSTER_USER}\npassword  {cluster.broker_password}\n")
        print("The authority to trust, in a file:\n")
        print(cluster.ca_pem, end="")
        return 0
    if importlib.util.find_spec("amqtt") is None:
        raise UnavailableError("the broker is not installed: pip install 'unicluster[broker]'")
    if not 0 < args.port < 65536:
        raise InputError(f"--port {args.port}: between 1 and 65535")
    check_free(args.host, args.port)
    # The library reads its keys from files.
    with tempfile.TemporaryDirectory(prefix="unicluster-broker-") as folder:
        identity = cluster.issue(default_name())
        (Path(folder) / "key.pem").touch(0o600)
        for name in ("key", "cert", "ca"):
            (Path(folder) / f"{name}.pem").write_text(getattr(identity, f"{name}_pem"))
        settings = _settings(args.host, args.port, Path(folder), cluster.broker_password)
        return asyncio.run(_serve(settings, args.host, args.port))


def _settings(host: str, port: int, folder: Path, password: str) -> dict[str, Any]:
    return {
        "listeners": {
            "default": {
                "type": "tcp",
                # The library has no word for all addresses.
                "bind": join_address(host or "0.0.0.0", port),  # noqa: S104
                "max_connections": CONNECTIONS,
                "ssl": True,
                "cafile": str(folder / "ca.pem"),
                "certfile": str(folder / "cert.pem"),
                "keyfile": str(folder / "key.pem"),
            }
        },
        "plugins": {
            "coordinator.commands.broker_auth.PasswordPlugin": {
                "user": CLUSTER_USER,
                "password": password,
            }
        },
    }


async def _serve(settings: dict[str, Any], host: str, port: int) -> int:
    from amqtt.broker import Broker

    logging.getLogger("amqtt").setLevel(logging.WARNING)
    logging.getLogger("transitions").setLevel(logging.WARNING)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    broker = Broker(settings)
    await broker.start()
    try:
        where = join_address(host or default_name(), port)
        print(f"MQTT broker at {where}, with TLS. On the machines of the cluster:\n")
        print(f"  unicluster join --mqtt 'mqtts://{where}?ca=cluster'\n")
        print("Others: `unicluster broker --show-password`. Ctrl-C ends it.", flush=True)
        notify("READY=1")
        await stop.wait()
    finally:
        await broker.shutdown()
    return 0
