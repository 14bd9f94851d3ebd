"""Speed of mlx-lm itself in the same run, alone and over its ring; of a GGUF that of llama.cpp."""

import asyncio
import contextlib
import json
import socket
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from pathlib import Path

from coordinator.fleet import local
from coordinator.programs import BASELINE
from unicluster.benchmark.measure import Ask
from unicluster.checkpoints.checkpoint import is_gguf
from unicluster.errors import UnavailableError

ONE = "mlx-lm in one process"
ONE_GGML = "llama.cpp in one process"
# To load a model, or for the next token of it.
LINE_SECONDS = 1800.0


class Baseline:
    """Processes that compute together; the first one reports the tokens."""

    def __init__(self, ranks: list[asyncio.subprocess.Process]) -> None:
        self.refused = ""  # why there is nothing to compare with
        self._ranks = ranks

    async def until_ready(self) -> None:
        """Returns when they answer, or are known not to."""
        for said in [await self._line(rank) for rank in self._ranks]:
            if said != "ready":
                self.refused = said.removeprefix("refused: ")

    async def ask(
        self, prompt: Sequence[int], tokens: int, *, reuse: bool = False
    ) -> AsyncGenerator[Sequence[int], None]:
        """An `Ask`; nothing is ever reused."""
        request = json.dumps({"prompt": list(prompt), "tokens": tokens}).encode() + b"\n"
        for rank in self._ranks:
            if rank.stdin is not None:
                rank.stdin.write(request)
        for _ in range(tokens):
            yield [int(await self._line(self._ranks[0]))]

    async def _line(self, rank: asyncio.subprocess.Process) -> str:
        line = b""
        if rank.stdout is not None:
            try:
                async with asyncio.timeout(LINE_SECONDS):
                    line = await rank.stdout.readline()
            except TimeoutError:
                reason = f"the process to compare with said nothing for {LINE_SECONDS:.0f} s"
                raise UnavailableError(reason) from None
        if not line:
            said = await rank.stderr.read() if rank.stderr is not None else b""
            last = (said.decode(errors="replace").strip().splitlines() or ["no reason given"])[-1]
            raise UnavailableError(f"the process to compare with ended: {last}")
        return line.decode().strip()


@contextlib.asynccontextmanager
async def baselines(model: str, stages: int) -> AsyncIterator[tuple[dict[str, Ask], list[str]]]:
    """Baselines by name while the block runs, and the reasons for those that are missing."""
    async with contextlib.AsyncExitStack() as stack:
        gguf = is_gguf(model)
        one = ONE_GGML if gguf else ONE
        compared = {one: await stack.enter_async_context(running(BASELINE, model))}
        if stages > 1 and not gguf:
            name = f"mlx-lm's ring of {stages}"
            compared[name] = await stack.enter_async_context(ring(model, stages))
        yield (
            {name: each.ask for name, each in compared.items() if not each.refused},
            [each.refused for each in compared.values() if each.refused],
        )


@contextlib.asynccontextmanager
async def ring(model: str, count: int) -> AsyncIterator[Baseline]:
    """mlx-lm's own pipeline of `count` processes while the block runs."""
    with tempfile.TemporaryDirectory() as folder:
        hosts = Path(folder) / "hosts.json"
        hosts.write_text(json.dumps([[f"{local.HOST}:{port}"] for port in _ports(count)]))
        ranks = [{"MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts)} for rank in range(count)]
        async with running(BASELINE, model, settings=ranks) as baseline:
            yield baseline


@contextlib.asynccontextmanager
async def running(
    *command: str, settings: Sequence[dict[str, str]] = ({},)
) -> AsyncIterator[Baseline]:
    """A module and its arguments, which speaks as BASELINE does, while the block runs.

    settings: variables in the environment of each of its processes.
    """
    ranks: list[asyncio.subprocess.Process] = []
    try:
        for each in settings:
            ranks.append(await local.start(*command, pipes=True, env=each))
        baseline = Baseline(ranks)
        await baseline.until_ready()
        yield baseline
    finally:
        await local.end(ranks)


def _ports(count: int) -> list[int]:
    """Free TCP ports on loopback."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind((local.HOST, 0))
        return [each.getsockname()[1] for each in sockets]
