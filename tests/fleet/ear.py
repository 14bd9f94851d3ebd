"""Listens at a broker until all topics that it waits for were published; prints it as JSON.

    python -m tests.fleet.ear HOST PORT CA USER PASSWORD TOPIC[=VALUE] ...

A process of its own, because it has to run inside the hosts' network.
"""

import json
import ssl
import sys
import threading

import paho.mqtt.client as paho

SECONDS = 120.0


def main() -> None:
    host, port, ca, user, password, *wanted = sys.argv[1:]
    topics = dict(word.partition("=")[::2] for word in wanted)
    heard: dict[str, str] = {}
    done = threading.Event()

    def hear(client: paho.Client, data: object, message: paho.MQTTMessage) -> None:
        text = message.payload.decode()
        if topics.get(message.topic) in ("", text):
            heard[message.topic] = text
        if len(heard) == len(topics):
            done.set()

    client = paho.Client(paho.CallbackAPIVersion.VERSION2)
    context = ssl.create_default_context(cafile=ca)
    context.check_hostname = False  # the cluster's certificates are for a role
    client.tls_set_context(context)
    client.username_pw_set(user, password)
    client.on_message = hear
    client.on_connect = lambda client, *rest: client.subscribe("#", qos=1)
    client.connect(host, int(port))
    client.loop_start()
    complete = done.wait(SECONDS)
    print(json.dumps(heard))
    sys.exit(0 if complete else "not heard: " + ", ".join(set(topics) - set(heard)))


if __name__ == "__main__":
    main()
