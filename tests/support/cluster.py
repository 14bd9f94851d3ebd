"""A whole cluster on this machine, of real processes: agents, `serve`, and other commands.

with LocalCluster(tmp_path) as cluster:
    for name in ("ann", "bob"):
        cluster.start_agent(name, memory=1_000_000)
    with cluster.serve(model) as server, server.client() as client:
        print(client.chat("hello").text)

At the end all programs are ended, and it is an error if anything is left running.
"""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

import mlx.core as mx
import psutil

from tests.support.deadlines import scaled
from tests.support.tiny import EOS, tiny_config, write_model
from unicluster import Client
from unicluster.client.answers import ChatInfo
from unicluster.client.client import AsyncClient
from unicluster.cluster.channels import join_address
from unicluster.trust.cluster import Cluster
from unicluster.trust.store import Store

ROOT = Path(__file__).parents[2]
HOST = "127.0.0.1"
# Seconds on an idle machine, as are all deadlines here: on a busy one they are longer. For what
# takes a second or two.
DEADLINE = 60.0
# To be gone after a signal to end: a worker is given 5 s before it is killed.
END_DEADLINE = 15.0


def until(condition: Callable[[], Any], what: str, deadline: float = DEADLINE) -> Any:
    """The first true value of `condition`; fails, naming `what` was waited for, at the deadline."""
    started = time.monotonic()
    while not (value := condition()):
        if (waited := time.monotonic() - started) > scaled(deadline):
            raise AssertionError(f"after {waited:.0f} s still not: {what}")
        time.sleep(0.02)
    return value


def endless_model(path: Path, model_type: str = "llama", **config: Any) -> Path:
    """A tiny model whose greedy answers never end by themselves.

    The logit of the end token is always 0, and one of the other 263 is always above that.
    """
    write_model(path, tiny_config(model_type) | config)
    file = str(path / "model.safetensors")
    weights: Any = mx.load(file)
    head = next((name for name in weights if "lm_head" in name), None)
    name = head or next(name for name in weights if "embed_tokens" in name)
    weights[name][EOS] = 0
    mx.save_safetensors(file, weights, {"format": "mlx"})
    return path


@dataclass(frozen=True)
class Result:
    """How a command ended."""

    code: int
    out: str
    err: str


class Program:
    """A running `unicluster` command. Its output goes to files, so it never has to be read."""

    def __init__(
        self,
        arguments: Iterable[str],
        env: dict[str, str],
        log: Path,
        prefix: Sequence[str] = (),
    ) -> None:
        """`prefix` is a command that runs a command, as `nice` does."""
        self._paths = log.with_suffix(".out"), log.with_suffix(".err")
        with self._paths[0].open("wb") as out, self._paths[1].open("wb") as err:
            self.process = subprocess.Popen(
                [*prefix, sys.executable, "-m", "unicluster", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env=env,
                cwd=log.parent,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    @property
    def out(self) -> str:
        return self._paths[0].read_text()

    @property
    def err(self) -> str:
        return self._paths[1].read_text()

    def wait_for(self, pattern: str, deadline: float = DEADLINE) -> re.Match[str]:
        """Waits until `pattern` is in the output; fails if the program ends before."""

        def look() -> re.Match[str] | None:
            running = self.running
            found = re.search(pattern, self.out)
            if found is None and not running:
                raise AssertionError(f"ended without {pattern!r}:\n{self.out}\n{self.err}")
            return found

        found: re.Match[str] = until(look, f"{pattern!r} in the output", deadline)
        return found

    def result(self, deadline: float = DEADLINE) -> Result:
        """Waits for the end."""
        code = self.process.wait(scaled(deadline))
        return Result(code, self.out, self.err)

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def end(self, number: signal.Signals = signal.SIGTERM) -> Result:
        """Sends the signal, if it runs, and waits for its end."""
        if self.running:
            self.send(number)
        return self.result(END_DEADLINE)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(scaled(END_DEADLINE))


class AgentProgram(Program):
    """`unicluster join`."""

    def __init__(
        self,
        name: str,
        arguments: Iterable[str],
        env: dict[str, str],
        log: Path,
        prefix: Sequence[str] = (),
        *,
        spare: bool = False,
    ) -> None:
        """spare: with a spare worker, which `workers` leaves out."""
        more = () if spare else ("--no-spare",)
        super().__init__(["join", "--name", name, *more, *arguments], env, log, prefix)
        self.name = name
        self.spare = spare
        self.host = HOST

    @property
    def address(self) -> str:
        """Where it listens, once it has joined."""
        port = self.wait_for(r", port (\d+)\.\n")[1]
        return join_address(self.host, int(port))

    @property
    def workers(self) -> list[psutil.Process]:
        """Its worker processes that are alive."""
        try:
            children = psutil.Process(self.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []
        workers = [child for child in children if is_worker(child)]
        return list(filter(has_stage, workers)) if self.spare else workers

    @property
    def spare_workers(self) -> list[psutil.Process]:
        """Its worker processes that wait for a stage."""
        staged = {worker.pid for worker in self.workers}
        children = psutil.Process(self.pid).children(recursive=True)
        return [child for child in children if is_worker(child) and child.pid not in staged]

    @property
    def worker(self) -> psutil.Process:
        (worker,) = self.workers
        return worker


class ServeProgram(Program):
    """`unicluster serve`, a context manager that unloads the model at its end."""

    def __init__(
        self,
        arguments: Iterable[str],
        env: dict[str, str],
        log: Path,
        cluster: Cluster,
        prefix: Sequence[str] = (),
    ) -> None:
        super().__init__(["serve", *arguments], env, log, prefix)
        self._cluster = cluster

    @property
    def address(self) -> str:
        """Where it answers, once it does."""
        return self.wait_for(r"gRPC (\S+)")[1]

    @property
    def http(self) -> str:
        """The URL at which it answers over HTTP, once it does."""
        return self.wait_for(r"(https?://\S+)/v1 ")[1]

    def client(self) -> Client:
        return Client(self.address, cluster=self._cluster)

    def async_client(self, resume: float | None = None) -> AsyncClient:
        return AsyncClient(self.address, cluster=self._cluster, resume=resume)

    def describe(self) -> ChatInfo:
        with self.client() as client:
            return client.describe()

    def __enter__(self) -> Self:
        self.wait_for("Ctrl-C unloads")
        return self

    def __exit__(self, *error: object) -> None:
        self.end()


class LocalCluster:
    """Programs that share a home of their own, and so a cluster of their own."""

    def __init__(self, folder: Path, *, home: Path | None = None, **env: str) -> None:
        self.folder = folder
        self.home = home or folder / "home"
        self.agents: dict[str, AgentProgram] = {}
        self.env = {
            **os.environ,
            "UNICLUSTER_HOME": str(self.home),
            "PYTHONPATH": os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(ROOT)])),
            "PYTHONUNBUFFERED": "1",
            "COLUMNS": "200",
            "TERM": "dumb",
            "HF_HUB_OFFLINE": "1",
            **env,
        }
        self._started: list[Program] = []
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def cluster(self) -> Cluster:
        return Store(self.home).require()

    def start_agent(
        self,
        name: str,
        *arguments: str,
        memory: int | str = "1GB",
        host: str = HOST,
        prefix: Sequence[str] = (),
        spare: bool = False,
        **env: str,
    ) -> AgentProgram:
        """Starts an agent that offers `memory`; doesn't wait until it has joined."""
        where = ("--host", host, "--port", "0", "--memory", str(memory))
        log = self._log(name)
        started = [*where, *arguments]
        agent = AgentProgram(name, started, self.env | env, log, prefix, spare=spare)
        agent.host = host
        self.agents[name] = agent
        self._started.append(agent)
        return agent

    def start_agents(self, *names: str, memory: int | str = "1GB", spare: bool = False) -> None:
        """Starts agents and waits until all have joined."""
        for name in names:
            self.start_agent(name, memory=memory, spare=spare)
        self.wait_for_agents()

    def wait_for_agents(self) -> None:
        """Waits until all that were started have joined."""
        for agent in self.agents.values():
            agent.wait_for("Ctrl-C leaves")

    def serve(
        self,
        model: Path | str,
        *arguments: str,
        prefix: Sequence[str] = (),
        env: Mapping[str, str] = MappingProxyType({}),
    ) -> ServeProgram:
        """Starts to serve. As a context manager it waits until the model answers."""
        where = (
            "--host",
            HOST,
            "--grpc-port",
            "0",
            "--http-port",
            "0",
        )  # those of the caller come later, and win
        log = self._log("serve")
        served = [str(model), *where, *arguments]
        server = ServeProgram(served, {**self.env, **env}, log, self.cluster, prefix)
        self._started.append(server)
        return server

    def start(self, *arguments: str, prefix: Sequence[str] = ()) -> Program:
        """Starts any command, never on a default port: unicluster may run on this machine."""
        program = Program(on_free_ports(arguments), self.env, self._log(arguments[0]), prefix)
        self._started.append(program)
        return program

    def run(self, *arguments: str, prefix: Sequence[str] = ()) -> Result:
        """Runs any command to its end."""
        return self.start(*arguments, prefix=prefix).result()

    def processes(self) -> list[psutil.Process]:
        """Everything alive that was started here, by whomever."""
        return [p for p in psutil.process_iter() if _home_of(p) == str(self.home)]

    def workers(self) -> list[psutil.Process]:
        return [process for process in self.processes() if is_worker(process)]

    def wait_for_no_workers(self, deadline: float = END_DEADLINE) -> None:
        until(lambda: not self.workers(), "all workers are gone", deadline)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        """Ends all programs, the last started first. AssertionError if one stays."""
        try:
            for program in reversed(self._started):
                program.end()
            until(lambda: not self.processes(), "everything has ended", END_DEADLINE)
        finally:
            for process in self.processes():
                process.kill()

    def _log(self, name: str) -> Path:
        return self.folder / f"{len(self._started)}-{name}"


def on_free_ports(arguments: Sequence[str]) -> list[str]:
    """The command on any free port. A port among `arguments` comes later, and wins."""
    command, *rest = arguments
    ports = {"join": ["--port", "0"], "serve": ["--grpc-port", "0", "--http-port", "0"]}
    return [command, *ports.get(command, []), *rest]


def is_worker(process: psutil.Process) -> bool:
    """Whether it is a worker that has a stage, or has not been given one yet."""
    try:
        return "node.worker" in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def has_stage(worker: psutil.Process) -> bool:
    """Whether a worker has a stage: it listens at its port then, before it loads."""
    try:
        if sys.platform != "linux":
            return any(c.status == psutil.CONN_LISTEN for c in worker.net_connections("tcp"))
        # psutil looks at this process's network; the worker may be in another one.
        of = Path("/proc", str(worker.pid))
        opened = {os.readlink(file) for file in (of / "fd").iterdir()}
        sockets = ((of / "net" / name).read_text().splitlines()[1:] for name in ("tcp", "tcp6"))
        rows = (line.split() for lines in sockets for line in lines)
        return any(row[3] == _LISTENS and f"socket:[{row[9]}]" in opened for row in rows)
    except (psutil.Error, OSError):
        return False


_LISTENS = "0A"  # in /proc/net/tcp


def _home_of(process: psutil.Process) -> str | None:
    try:
        if process.status() == psutil.STATUS_ZOMBIE:
            return None
        home: str | None = process.environ().get("UNICLUSTER_HOME")
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return None
    return home
