"""The cluster beneath the faults: its machines and its `serve`, and who starts them again."""

import asyncio
import shutil
from pathlib import Path

import psutil

from tests.chaos.network import DOOR, Lan
from tests.chaos.points import Points
from tests.support.cluster import HOST, AgentProgram, LocalCluster, ServeProgram
from tests.support.mounts import behind_a_disk
from unicluster.cluster.channels import split_address

CONTEXT = 2048
USERS = 4
SUPERVISE_SECONDS = 0.3
# With which a unit does not start a program again.
USELESS = 2


class Machines:
    """Machines by name, each with a disk of its own for its copy of the model and its caches.

    lan: None where all are on one network. disk: a folder on a disk that can be filled. hidden:
    machines see nothing of the model's folder, and fetch what they need of it.
    """

    def __init__(
        self,
        cluster: LocalCluster,
        model: Path,
        memory: int,
        points: Points,
        lan: Lan | None,
        disk: Path,
        *,
        hidden: bool,
    ) -> None:
        self.cluster = cluster
        self.stages: tuple[str, ...] = ()  # who has them, the head first, when it was last asked
        self.absent: set[str] = set()
        self.gave_up: list[str] = []  # last words of `serve`
        self.wrong: list[str] = []
        self._model = model
        self._memory = memory
        self._points = points
        self._lan = lan
        self._disk = disk
        self._hidden = hidden
        self._port = "0"

    def begin(self, *names: str) -> None:
        """Starts machines and `serve`; returns when it answers."""
        for name in names:
            self.start(name)
        self.cluster.wait_for_agents()
        self.serve()
        self._port = str(split_address(self.server.address)[1])

    def start(self, name: str) -> None:
        network = self._lan.prefix(name) if self._lan is not None else ()
        disk = behind_a_disk(self._model) if self._hidden else ()
        self.cluster.start_agent(
            name,
            *("--cache-dir", str(self._disk / name / "prompts")),
            memory=self._memory,
            host=self._lan.address(name) if self._lan is not None else HOST,
            prefix=(*network, *disk),
            spare=True,
            HF_HOME=str(self._disk / name / "models"),
            **self._points.variables(name),
        )
        self.absent.discard(name)

    def serve(self) -> None:
        options = {
            "--context": str(CONTEXT),
            "--users": str(USERS),
            "--cache-disk": "1MB",
            "--grpc-port": self._port,
            "--host": self._lan.address(DOOR) if self._lan is not None else HOST,
        }
        words = [word for pair in options.items() for word in pair] + ["--debug"]
        self.server: ServeProgram = self.cluster.serve(
            self._model, *words, env=self._points.variables(DOOR)
        )

    def lose_files(self, name: str) -> None:
        """As a machine does that gets a new disk."""
        shutil.rmtree(self._disk / name, ignore_errors=True)

    def logged(self, name: str, words: str) -> int:
        """How often a machine, or `serve`, has said so."""
        kind = "serve" if name == DOOR else name
        logs = self.cluster.folder.glob(f"*-{kind}.err")
        return sum(log.read_text(errors="replace").count(words) for log in logs)

    async def supervise(self) -> None:
        """Starts programs again that ended by themselves, as their units do."""
        while True:
            await asyncio.sleep(SUPERVISE_SECONDS)
            if not self.server.running:
                self._serve_ended()
                self.serve()
            for name, agent in list(self.cluster.agents.items()):
                if not agent.running and name not in self.absent:
                    self.start(name)

    def _serve_ended(self) -> None:
        code = self.server.process.returncode
        out, err = (text.strip().splitlines() for text in (self.server.out, self.server.err))
        words = f"code {code}: {' / '.join(out[-1:] + err[-1:])}"
        self.gave_up.append(words)
        if code == USELESS:
            self.wrong.append(f"`serve` ended so that its unit does not start it again, {words}")

    @property
    def names(self) -> list[str]:
        return list(self.cluster.agents)

    def note_stages(self, names: tuple[str, ...]) -> None:
        self.stages = names

    def there(self) -> list[AgentProgram]:
        """Machines that run."""
        agents = self.cluster.agents.items()
        return [agent for name, agent in agents if name not in self.absent and agent.running]

    def working(self) -> list[AgentProgram]:
        """Machines that have a stage; any where none has."""
        there = self.there()
        return [agent for agent in there if agent.workers] or there

    def workers(self) -> list[psutil.Process]:
        return [worker for agent in self.there() for worker in agent.workers]
