"""Home Assistant's MQTT discovery: machines and models appear there by themselves.

https://www.home-assistant.io/integrations/mqtt/#device-discovery-payload
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from unicluster import __version__


@dataclass(frozen=True)
class Sensor:
    """One value of a JSON topic. `kind` and `unit` are Home Assistant's device class and unit."""

    key: str
    name: str
    topic: str
    template: str
    kind: str | None = None
    unit: str | None = None
    measured: bool = True  # a number that is worth a diagram

    def component(self, unique: str) -> dict[str, Any]:
        fields = {
            "p": "sensor",
            "unique_id": f"{unique}_{self.key}",
            "name": self.name,
            "state_topic": self.topic,
            "value_template": self.template,
            "device_class": self.kind,
            "unit_of_measurement": self.unit,
            "state_class": "measurement" if self.measured else None,
        }
        return {name: value for name, value in fields.items() if value is not None}


def discovery(
    unique: str, name: str, model: str, status_topic: str, sensors: Iterable[Sensor]
) -> Mapping[str, Any]:
    """The payload that makes a device of it, with a sensor for whether it is online."""
    online = {
        "p": "binary_sensor",
        "unique_id": f"{unique}_online",
        "name": "Online",
        "device_class": "connectivity",
        "state_topic": status_topic,
        "payload_on": "online",
        "payload_off": "offline",
    }
    availability = {"availability_topic": status_topic}
    components = {s.key: {**s.component(unique), **availability} for s in sensors}
    return {
        "dev": {"ids": [unique], "name": name, "mdl": model, "mf": "unicluster"},
        "o": {"name": "unicluster", "sw": __version__},
        "cmps": {"online": online, **components},
    }
