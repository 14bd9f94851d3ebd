"""Address of an MQTT broker: `mqtts://user:password@broker:8883/prefix`."""

import logging
import os
import ssl
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from unicluster.command_line import Option, on_command_line
from unicluster.errors import InputError
from unicluster.trust.cluster import Cluster

log = logging.getLogger(__name__)

VARIABLE = "UNICLUSTER_MQTT"
FILE_VARIABLE = "UNICLUSTER_MQTT_FILE"
PREFIX = "unicluster"
DISCOVERY = "homeassistant"
_PORTS = {"mqtt": 1883, "mqtts": 8883}
_OPTIONS = {"ca", "discovery"}


@dataclass(frozen=True)
class BrokerUrl:
    """Address and credentials of a broker."""

    host: str
    port: int
    prefix: str
    user: str | None
    password: str | None = field(repr=False)
    tls: bool
    ca: str  # a file; "cluster": the broker has a certificate of the cluster; "": the system's
    discovery: str  # Home Assistant's prefix; empty: none

    @property
    def where(self) -> str:
        """Host and port, for messages: without secrets."""
        return f"{self.host}:{self.port}"

    def tls_context(self, cluster: Cluster) -> ssl.SSLContext | None:
        """None for a connection without TLS. Raises InputError when the CA can't be read."""
        if not self.tls:
            return None
        try:
            if self.ca == "cluster":
                context = ssl.create_default_context(cadata=cluster.ca_pem)
                context.check_hostname = False  # its certificate names the role, not the address
                return context
            return ssl.create_default_context(cafile=self.ca or None)
        except (OSError, ssl.SSLError) as error:
            raise InputError(f"--mqtt: can't read the authority {self.ca}: {error}") from error


def mqtt_option() -> Option:
    return Option(
        "--mqtt",
        "publish to MQTT: mqtts://user:password@broker:8883/prefix. A password belongs into "
        f"the environment, or into a file that {FILE_VARIABLE} names: ps shows arguments",
        metavar="URL",
        envvar=VARIABLE,
    )


def chosen_broker(argument: str | None) -> BrokerUrl | None:
    """Broker of `--mqtt`, $UNICLUSTER_MQTT, or the file that $UNICLUSTER_MQTT_FILE names; or None.

    A command line is seen by all users of a machine: passwords belong into the other two.
    """
    url = argument or os.environ.get(VARIABLE, "")
    path = os.environ.get(FILE_VARIABLE, "")
    if not url and path:
        try:
            url = Path(path).read_text("utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{FILE_VARIABLE}: can't read {path}: {error}") from error
    if not url:
        return None
    broker = parse_broker(url)
    if broker.password is not None and on_command_line("mqtt"):
        log.warning(
            "--mqtt with a password shows in ps to all users of this machine: better %s in the "
            "environment, or a file that %s names",
            VARIABLE,
            FILE_VARIABLE,
        )
    return broker


def parse_broker(url: str) -> BrokerUrl:
    """Raises InputError, without the password, for what is no such address."""
    try:
        parts = urlsplit(url)
        port = parts.port
        query = parse_qs(parts.query, strict_parsing=bool(parts.query))
    except ValueError:  # which repeats a part of the URL, perhaps of its password
        raise _bad("its port or its options are invalid") from None
    if "@" in parts.path + parts.query + parts.fragment:
        raise _bad("in a password, write %2F for /, %3F for ?, %23 for # and %40 for @")
    if parts.scheme not in _PORTS:
        raise _bad("it begins with mqtts:// or, without TLS, mqtt://")
    if not parts.hostname:
        raise _bad("it names no host")
    if set(query) - _OPTIONS:
        raise _bad("its options are ca and discovery")
    tls = parts.scheme == "mqtts"
    password = unquote(parts.password) if parts.password is not None else None
    loopback = parts.hostname in ("localhost", "127.0.0.1", "::1")
    if password is not None and not tls and not loopback:
        raise _bad("a password needs TLS: mqtts://")
    prefix = unquote(parts.path).strip("/") or PREFIX
    if set(prefix) & set("#+\0"):
        raise _bad("a prefix has no # and no +")
    return BrokerUrl(
        host=parts.hostname,
        port=port or _PORTS[parts.scheme],
        prefix=prefix,
        user=unquote(parts.username) if parts.username else None,
        password=password,
        tls=tls,
        ca=query.get("ca", [""])[0],
        discovery=query.get("discovery", [DISCOVERY])[0].replace("off", "").strip("/"),
    )


def _bad(why: str) -> InputError:
    return InputError(f"--mqtt: write it like mqtts://user:password@broker:8883/prefix: {why}")
