"""Publishing to an MQTT broker, without ever waiting for it."""

import asyncio
import contextlib
import json
import logging
from collections import deque
from collections.abc import AsyncIterator, Coroutine, Mapping
from typing import Any

import aiomqtt

from unicluster.errors import in_one_line
from unicluster.retry import attempts, succeeded
from unicluster.telemetry.broker_url import BrokerUrl
from unicluster.trust.cluster import Cluster

log = logging.getLogger(__name__)

# aiomqtt logs each failed attempt; we say once when the broker goes and when it is back.
_quiet = logging.getLogger("unicluster.mqtt.client")
_quiet.setLevel(logging.CRITICAL)

Payload = Mapping[str, Any]

EVENTS_KEPT = 256
FIRST_RETRY_SECONDS = 1.0
LAST_RETRY_SECONDS = 60.0
# To connect, and for the broker to take a message; also the longest that ending waits.
ANSWER_SECONDS = 10.0
FAREWELL_SECONDS = 2.0
KEEPALIVE_SECONDS = 15
ONLINE, OFFLINE = "online", "offline"


class Publisher:
    """Publishes states and events of a machine, or a model, under `prefix/root`.

    async with Publisher(url, cluster, "node/studio").running() as publisher:
        publisher.state(publisher.topic("state"), {...})  # retained: only the last one counts
        publisher.event("unicluster/events", {...})  # the last 256 wait for a broker that is away

    `state` and `event` return at once, whatever the broker does.
    """

    def __init__(self, url: BrokerUrl, cluster: Cluster, root: str) -> None:
        self.url = url
        self._cluster = cluster
        self._context = url.tls_context(cluster)
        self._root = f"{url.prefix}/{root}"
        self._states: dict[str, str] = {}
        self._unsent: dict[str, None] = {}  # topics of states, in order
        self._events: deque[tuple[str, str]] = deque(maxlen=EVENTS_KEPT)
        self._stirred = asyncio.Event()

    @property
    def status_topic(self) -> str:
        return f"{self._root}/status"

    def topic(self, name: str) -> str:
        return f"{self._root}/{name}"

    def state(self, topic: str, payload: Payload) -> None:
        """Publishes retained at the whole `topic`, only when it differs from the last one."""
        text = json.dumps(payload, sort_keys=True)
        if self._states.get(topic) != text:
            self._states[topic] = text
            self._unsent[topic] = None
            self._stirred.set()

    def event(self, topic: str, payload: Payload) -> None:
        """Publishes without retaining. While the broker is away the oldest are dropped."""
        self._events.append((topic, json.dumps(payload, sort_keys=True)))
        self._stirred.set()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator["Publisher"]:
        """Sends while the block runs, and says `offline` at its end."""
        ending = asyncio.Event()
        task = asyncio.create_task(self._run(ending))
        try:
            yield self
        finally:
            ending.set()
            self._stirred.set()
            await asyncio.wait([task], timeout=FAREWELL_SECONDS)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _run(self, ending: asyncio.Event) -> None:
        away = False

        async def pause(seconds: float) -> None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(ending.wait(), seconds)

        async for attempt in attempts(
            f"MQTT broker {self.url.where}",
            lambda error: isinstance(error, (aiomqtt.MqttError, OSError)),
            first=FIRST_RETRY_SECONDS,
            last=LAST_RETRY_SECONDS,
            pause=pause,
        ):
            if ending.is_set():
                return
            with attempt:
                try:
                    async with self._client() as client:
                        if away:
                            log.warning("MQTT broker %s is back", self.url.where)
                        away = False
                        succeeded(attempt)
                        await self._serve(client, ending)
                except (aiomqtt.MqttError, OSError) as error:
                    if not away:
                        reason = in_one_line(error)
                        log.warning("MQTT broker %s: %s; retrying", self.url.where, reason)
                    away = True
                    raise

    def _client(self) -> aiomqtt.Client:
        user, password = self.url.user, self.url.password
        return aiomqtt.Client(
            self.url.host,
            self.url.port,
            username=user,
            password=password,
            tls_context=self._context,
            will=aiomqtt.Will(self.status_topic, OFFLINE, qos=1, retain=True),
            keepalive=KEEPALIVE_SECONDS,
            timeout=ANSWER_SECONDS,
            logger=_quiet,
        )

    async def _serve(self, client: aiomqtt.Client, ending: asyncio.Event) -> None:
        # A broker that restarted may have forgotten everything.
        self._unsent = dict.fromkeys(self._states)
        await client.publish(self.status_topic, ONLINE, qos=1, retain=True)
        while True:
            self._stirred.clear()
            while self._unsent:
                topic = next(iter(self._unsent))
                del self._unsent[topic]
                await client.publish(topic, self._states[topic], qos=1, retain=True)
            while self._events:
                event = self._events.popleft()
                await client.publish(*event, qos=1)
            if ending.is_set():
                await client.publish(self.status_topic, OFFLINE, qos=1, retain=True)
                return
            await self._wait(client)

    async def _wait(self, client: aiomqtt.Client) -> None:
        """Returns when there is something to send; raises when the broker has gone."""
        stirred = asyncio.ensure_future(self._stirred.wait())
        # Nothing is subscribed: it ends only with the connection.
        gone = asyncio.ensure_future(anext(aiter(client.messages)))
        try:
            await asyncio.wait([stirred, gone], return_when=asyncio.FIRST_COMPLETED)
            if gone.done():
                gone.result()
        finally:
            for task in (stirred, gone):
                task.cancel()
            await asyncio.gather(stirred, gone, return_exceptions=True)


@contextlib.asynccontextmanager
async def in_background(work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Runs `work` beside the block and ends it with the block; raises what it raised."""
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        if not task.done():
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
