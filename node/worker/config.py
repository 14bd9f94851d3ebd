"""A worker's configuration; apart from the worker, because the agent must not import MLX."""

import base64
import json
from dataclasses import dataclass, field, fields

from unicluster.v1.node_pb2 import StageSpec


@dataclass(frozen=True)
class WorkerConfig:
    """A stage as the coordinator specified it, and settings that only the worker's starter knows.

    spec: read where its options act; nothing of it is copied. sources: addresses in the spec, as
    this machine dials them. vouching: the trusted ones among them. elsewhere: other addresses of
    the machines at some of them. alone: no other machine has files, so all that is missing comes
    from the hub, whatever the spec says.
    cache_dir: directory of this machine for prefixes on disk; empty: none.
    prebuilt: decode steps are built before their input arrives; see mlx/prebuilt.
    """

    spec: StageSpec
    node: str
    host: str
    port: int
    identity: dict[str, str]
    sources: tuple[str, ...] = ()
    vouching: tuple[str, ...] = ()
    elsewhere: dict[str, list[str]] = field(default_factory=dict)
    alone: bool = False
    cache_dir: str = ""
    prebuilt: bool = True

    @property
    def hub_files(self) -> list[str] | None:
        """Names of files to fetch from the hub, as for `fetch_ranges`; None: all."""
        return None if self.alone else list(self.spec.hub_files)

    def to_line(self) -> bytes:
        """One line of JSON, for the worker's standard input."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        values["spec"] = base64.b64encode(self.spec.SerializeToString()).decode()
        return json.dumps(values).encode() + b"\n"

    @classmethod
    def from_line(cls, line: str | bytes) -> "WorkerConfig":
        """Undoes `to_line`. Raises ValueError, KeyError or TypeError for another line."""
        values = json.loads(line)
        spec = StageSpec.FromString(base64.b64decode(values.pop("spec")))
        addresses = {name: tuple(values[name]) for name in ("sources", "vouching")}
        return cls(spec, **values | addresses)
