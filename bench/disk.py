"""Time to first token of a long prompt: computed, and read from disk after a restart of everything.

python -m bench.disk [MODEL] [--words N] [--memory 12MB,12MB] [--rounds N]

Agents on this machine and `serve` are started, asked, and ended, again and again; each round has a
prompt of its own, which is computed and then, after the next start, found on disk. Prints medians,
and bytes as `status` has them beside those of the files.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

from tests.support.cluster import LocalCluster
from tests.support.prefixes import counted
from unicluster.client.answers import Answer
from unicluster.client.client import Client

CACHE = "1GB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--words", type=int, default=700, help="of the prompt")
    parser.add_argument("--memory", default="40MB", help="of each agent")
    parser.add_argument("--context", default="2048")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    sizes = options.memory.split(",")
    computed, read = [], []
    with tempfile.TemporaryDirectory() as folder, LocalCluster(Path(folder)) as cluster:
        for number in range(options.rounds + 1):
            for index, memory in enumerate(sizes):
                where = str(cluster.folder / f"disk{index}")
                cluster.start_agent(f"m{index}", "--cache-dir", where, memory=memory)
            cluster.wait_for_agents()
            arguments = ("--cache-disk", CACHE, "--context", options.context, "--users", "1")
            server = cluster.serve(options.model, *arguments)
            server.wait_for("Ctrl-C unloads", 300.0)
            with server, server.client() as client:
                client.chat("hello", max_tokens=4)
                if number:
                    read.append(asked(client, number - 1, options.words))
                if number < options.rounds:
                    computed.append(asked(client, number, options.words))
                stages = client.measure().stages
            for agent in list(cluster.agents):
                cluster.agents.pop(agent).end()
        files = sum(counted(cluster.folder / f"disk{index}") for index in range(len(sizes)))
        stated = sum(stage.disk_bytes for stage in stages)
    first, second = (
        statistics.median(a.timings.time_to_first_token_s for a in answers)
        for answers in (computed, read)
    )
    tokens = computed[0].usage.prompt_tokens
    cached = [answer.usage.cached_tokens for answer in read]
    same = all(a.text == b.text for a, b in zip(computed, read, strict=True))
    print(f"{len(sizes)} machines, {tokens} tokens, of which {cached} from disk; same: {same}")
    print(f"computed {first:.3f} s, from disk {second:.3f} s: {100 * second / first:.1f} %")
    print(f"on disk {files} bytes at the end; status stated {stated} in the last run")


def asked(client: Client, number: int, words: int) -> Answer:
    """The answer to a prompt that differs from the first word on for each number."""
    text = " ".join(f"w{number} the boat" for _ in range(words // 3))
    return client.chat(text, max_tokens=4, temperature=0)


if __name__ == "__main__":
    main()
