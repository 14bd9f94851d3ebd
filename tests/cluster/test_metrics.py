"""Metrics, status and traces of a model served over three machines by real processes."""

import json
import re
import signal
import socket
import ssl
import stat
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from http.client import HTTPResponse
from itertools import pairwise
from pathlib import Path
from typing import Any

import grpc
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.support.cluster import ROOT, LocalCluster, ServeProgram, endless_model, until
from tests.support.deadlines import scaled
from tests.support.strikes import status_while_answering
from unicluster.client.answers import Answer
from unicluster.client.trace import Span, Trace
from unicluster.cluster.channels import connect_sync, split_address
from unicluster.trust.cluster import Cluster
from unicluster.trust.identity import SERVER_NAME, Identity
from unicluster.v1.chat_pb2 import DescribeChatRequest
from unicluster.v1.chat_pb2_grpc import ChatStub

MACHINES = ("ann", "bob", "cat")
# Three of these hold the model, and two do not.
MEMORY = 1_100_000
PROMPT = "What is " + "very " * 30 + "long?"
TOKENS = 20


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    with LocalCluster(tmp_path_factory.mktemp("cluster")) as cluster:
        cluster.start_agents(*MACHINES, memory=MEMORY)
        yield cluster


@pytest.fixture(scope="module")
def server(
    cluster: LocalCluster, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServeProgram]:
    """Has answered twice."""
    model = endless_model(tmp_path_factory.mktemp("models") / "llama")
    options = ("--context", "512", "--users", "2", "--metrics-port", "0")
    with cluster.serve(model, *options, "--nodes", ",".join(MACHINES)) as server:
        with server.client() as client:
            client.chat(PROMPT, temperature=0, max_tokens=TOKENS)
            client.chat(PROMPT + " Tell me.", temperature=0, max_tokens=TOKENS)
        yield server
    assert server.result().code == 0


@pytest.fixture(scope="module")
def scraper(cluster: LocalCluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that `unicluster token cert` writes."""
    folder = tmp_path_factory.mktemp("scraper") / "certificates"
    assert cluster.run("token", "cert", str(folder)).code == 0
    return folder


def fetch(
    server: ServeProgram, folder: Path, *, certificate: bool = True, path: str = "/metrics"
) -> tuple[int, str]:
    """Status and page, asked for as Prometheus would, with the files in `folder`."""
    host, port = split_address(server.wait_for(r"https://(\S+)/metrics")[1])
    tls = ssl.create_default_context(cafile=str(folder / "ca.pem"))
    if certificate:
        tls.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    with (
        socket.create_connection((host, port), timeout=scaled(30)) as plain,
        tls.wrap_socket(plain, server_hostname=SERVER_NAME) as secured,
    ):
        secured.sendall(f"GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
        response = HTTPResponse(secured)
        response.begin()
        return response.status, response.read().decode()


def samples(page: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Values by name and labels."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
    }


# Metrics


def test_a_scrape_says_what_the_machines_and_the_answers_did(
    server: ServeProgram, scraper: Path
) -> None:
    _, page = fetch(server, scraper)

    told = samples(page)
    machines = [stage.node for stage in server.describe().stages]
    assert told["unicluster_deployment_state", (("state", "ready"),)] == 1
    assert told["unicluster_requests_total", (("outcome", "length"),)] >= 2
    assert told["unicluster_generated_tokens_total", ()] >= 2 * TOKENS
    assert told["unicluster_prompt_tokens_reused_total", ()] > len(PROMPT) / 2
    assert told["unicluster_time_to_first_token_seconds_count", ()] >= 2
    assert told["unicluster_inter_token_seconds_count", ()] >= 2 * (TOKENS - 1)
    assert told["unicluster_cache_limit_bytes", ()] > 0
    for index, machine in enumerate(machines):
        labels = ("machine", machine), ("stage", str(index))
        assert told["unicluster_stage_frames_total", labels] > 2 * TOKENS
        assert told["unicluster_stage_busy_seconds_total", labels] > 0
        assert told["unicluster_stage_queue_seconds_total", labels] > 0
        assert told["unicluster_stage_decode_seconds", labels] > 0
    for source, target in zip(machines, [*machines[1:], machines[0]], strict=True):
        labels = ("source", source), ("target", target)
        assert told["unicluster_hop_seconds_count", labels] > 2 * TOKENS
        assert told["unicluster_hop_seconds_sum", labels] > 0
        assert told["unicluster_hop_bytes_total", labels] > 0


def test_names_follow_the_conventions(server: ServeProgram, scraper: Path) -> None:
    _, page = fetch(server, scraper)

    families = list(text_string_to_metric_families(page))
    units = ("_seconds", "_bytes", "_tokens", "_total", "_info")
    for family in families:
        assert family.name.startswith("unicluster_")
        assert family.documentation
        if family.type == "counter":
            assert all(sample.name.endswith("_total") for sample in family.samples)
        if family.type in ("histogram", "summary"):
            assert family.name.endswith(units)


@pytest.mark.parametrize("file", ["grafana/unicluster.json", "prometheus/unicluster.rules.yml"])
def test_what_dashboards_and_alerts_ask_for_is_told(
    server: ServeProgram, scraper: Path, file: str
) -> None:
    _, page = fetch(server, scraper)

    asked = set(re.findall(r"\bunicluster_\w+", (ROOT / "deploy" / file).read_text()))
    assert asked
    assert asked <= {name for name, _ in samples(page)}


def test_nothing_is_told_without_a_certificate(server: ServeProgram, scraper: Path) -> None:
    with pytest.raises((ssl.SSLError, ConnectionError)):
        fetch(server, scraper, certificate=False)


def test_nor_with_a_stranger_s(server: ServeProgram, scraper: Path, tmp_path: Path) -> None:
    ca_pem = (scraper / "ca.pem").read_text()
    write(replace(Cluster.new().issue("stranger"), ca_pem=ca_pem), tmp_path)

    with pytest.raises((ssl.SSLError, ConnectionError)):
        fetch(server, tmp_path)


def test_a_member_may_read_them_too(
    cluster: LocalCluster, server: ServeProgram, tmp_path: Path
) -> None:
    write(cluster.cluster.issue("member"), tmp_path)

    assert fetch(server, tmp_path)[0] == 200


def test_a_scraper_s_certificate_opens_no_other_port(
    cluster: LocalCluster, server: ServeProgram, scraper: Path
) -> None:
    key, cert = ((scraper / name).read_text() for name in ("key.pem", "cert.pem"))
    identity = Identity("scraper", key, cert, cluster.cluster.ca_pem)

    with connect_sync(server.address, identity) as channel, pytest.raises(grpc.RpcError) as caught:
        ChatStub(channel).Describe(DescribeChatRequest(), timeout=scaled(30))

    assert isinstance(caught.value, grpc.Call)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


def test_metrics_are_at_their_path_only(server: ServeProgram, scraper: Path) -> None:
    assert fetch(server, scraper, path="/")[0] == 404


def test_a_client_that_stays_silent_keeps_nobody_out(server: ServeProgram, scraper: Path) -> None:
    host, port = split_address(server.wait_for(r"https://(\S+)/metrics")[1])

    with socket.create_connection((host, port)):
        assert fetch(server, scraper)[0] == 200


def test_a_key_is_its_owner_s_alone(scraper: Path) -> None:
    assert stat.S_IMODE((scraper / "key.pem").stat().st_mode) == 0o600


def test_a_metrics_port_that_is_taken_is_said_before_anything_loads(
    cluster: LocalCluster, server: ServeProgram
) -> None:
    port = server.wait_for(r"https://\S+:(\d+)/metrics")[1]

    told = cluster.run("serve", "demo", "--grpc-port", "0", "--metrics-port", port)

    assert told.code == 2
    assert f"port {port}" in told.err
    assert "--metrics-port" in told.err


# Status


def test_status_says_what_is_served_and_how_it_goes(
    cluster: LocalCluster, server: ServeProgram
) -> None:
    # Without --server: it is found by mDNS.
    told = cluster.run("status")

    assert (told.code, told.err) == (0, "")
    assert f"llama float32 at {server.address}: ready" in told.out
    for stage in server.describe().stages:
        assert re.search(rf"{stage.node} +{stage.first_layer}-{stage.end_layer - 1} ", told.out)
    for part in ("context 512, 2 users, 2 lanes", "0 running, 0 waiting", "cached, of"):
        assert part in told.out


def test_status_as_json_has_all_figures(cluster: LocalCluster, server: ServeProgram) -> None:
    told = status_while_answering(cluster, server, tokens=400)

    assert told["address"] == server.address
    assert told["info"]["model"] == "llama"
    assert (told["running"], told["waiting"]) == (1, 0)
    assert [stage["machine"] for stage in told["stages"]] == [
        stage.node for stage in server.describe().stages
    ]
    assert all(0 < stage["busy"] <= 1 for stage in told["stages"])
    assert all(hop["decode_s"] > 0 for hop in told["hops"])


def test_status_that_watches_goes_on(cluster: LocalCluster, server: ServeProgram) -> None:
    watching = cluster.start("status", "--watch", "--json", "--server", server.address)

    until(lambda: watching.out.count("\n") >= 3, "three readings")

    assert watching.end(signal.SIGINT).code == 130


def test_requests_are_counted_by_how_they_end(server: ServeProgram) -> None:
    with server.client() as client:
        before = client.measure().ended["cancelled"]

        def one_more() -> bool:
            """An answer is given up. It may have ended before: then it counts as another kind."""
            events = client.stream(PROMPT, temperature=0, max_tokens=300)
            next(events)
            events.close()
            until(lambda: client.measure().running == 0, "its place is free")
            return client.measure().ended["cancelled"] > before

        until(one_more, "it is counted")


# Traces


@pytest.fixture(scope="module")
def answer(server: ServeProgram) -> Answer:
    """Traced. Its prompt is another than those before, so that it is prefilled."""
    with server.client() as client:
        return client.chat("No, " * 40, temperature=0, max_tokens=TOKENS, trace=True)


@pytest.fixture(scope="module")
def trace(answer: Answer) -> Trace:
    assert answer.trace is not None
    return answer.trace


def test_a_trace_has_every_step_of_every_token_on_all_stages(trace: Trace) -> None:
    steps = [span for span in trace.spans if span.name == "step"]

    assert len(trace.machines) == 3
    assert len(steps) >= TOKENS
    for step in steps:
        trips = {s.trip for s in trace.spans if s.trip and s.name == "away" and within(s, step)}
        assert trips
        for trip in trips:
            way = sorted((s for s in trace.spans if s.trip == trip), key=lambda s: s.start_s)
            assert [(s.name, s.stage) for s in way if s.name != "away"] == [
                *(("layers", 0), ("handing", 0)),
                *(("wire", 1), ("queue", 1), ("layers", 1), ("handing", 1)),
                *(("wire", 2), ("queue", 2), ("layers", 2), ("handing", 2)),
                *(("wire", 0), ("queue", 0), ("head", 0)),
            ]
            after = [s for s in way if s.name != "away"]
            assert all(b.start_s >= a.end_s - 1e-6 for a, b in pairwise(after))
        sampling = [s for s in trace.spans if s.name == "sampling" and within(s, step)]
        assert len(sampling) == 1


def test_a_trace_has_the_prompt_s_chunks_on_all_stages(trace: Trace) -> None:
    (prefill,) = (span for span in trace.spans if span.name == "prefill")
    chunks = [span for span in trace.spans if span.name == "chunk"]

    assert chunks  # how many, follows what was measured
    assert all(within(chunk, prefill) for chunk in chunks)
    first = [span for span in trace.spans if span.trip == 1 and span.name == "layers"]
    assert [span.stage for span in first] == [0, 1, 2]


def test_a_trace_agrees_with_the_timings(answer: Answer, trace: Trace) -> None:
    (request,) = (span for span in trace.spans if span.name == "request")

    assert all(within(span, request) for span in trace.spans)
    timings = answer.timings
    whole = timings.time_to_first_token_s + timings.decode_s
    assert whole <= request.duration_s


def test_chat_writes_a_trace_that_chrome_can_read(
    cluster: LocalCluster, server: ServeProgram, tmp_path: Path
) -> None:
    file = tmp_path / "trace.json"

    told = cluster.run("chat", "hello", "--max-tokens", "5", "--trace", str(file))

    assert (told.code, told.err) == (0, "")
    events = json.loads(file.read_text())["traceEvents"]
    names = [e["args"]["name"] for e in events if e["name"] == "process_name"]
    assert sorted(name.removesuffix(" (head)") for name in names) == sorted(MACHINES)
    check_events(events)


def test_an_answer_that_is_not_traced_has_no_trace(server: ServeProgram) -> None:
    with server.client() as client:
        assert client.chat("hello", max_tokens=2).trace is None


def test_only_an_answer_can_be_traced(cluster: LocalCluster, server: ServeProgram) -> None:
    told = cluster.run("chat", "hello", "--max-tokens", "2", "--trace", "/nowhere/trace.json")

    assert told.code == 2
    assert "/nowhere/trace.json can't be written" in told.err


def check_events(events: list[dict[str, Any]]) -> None:
    """As the trace event format has it: complete events nest, asynchronous ones come in pairs."""
    begun: dict[tuple[Any, ...], float] = {}
    open_ends: dict[tuple[int, int], list[float]] = defaultdict(list)
    timed = [event for event in events if event["ph"] != "M"]
    assert all({"name", "cat", "pid", "tid", "ts", "args"} <= event.keys() for event in timed)
    for event in sorted(timed, key=lambda e: (e["ts"], -e.get("dur", 0))):
        if event["ph"] == "X":
            ends = open_ends[event["pid"], event["tid"]]
            while ends and ends[-1] <= event["ts"] + 1:
                ends.pop()
            end = event["ts"] + event["dur"]
            assert event["dur"] >= 0
            assert not ends or end <= ends[-1] + 1
            ends.append(end)
    for event in timed:
        name = event["pid"], event["cat"], event.get("id")
        if event["ph"] == "b":
            begun[name] = event["ts"]
        elif event["ph"] == "e":
            assert begun.pop(name) <= event["ts"]
    assert not begun


def within(inner: Span, outer: Span) -> bool:
    return outer.start_s - 1e-6 <= inner.start_s and inner.end_s <= outer.end_s + 1e-6


def write(identity: Identity, folder: Path) -> None:
    (folder / "ca.pem").write_text(identity.ca_pem)
    (folder / "cert.pem").write_text(identity.cert_pem)
    (folder / "key.pem").write_text(identity.key_pem)
