"""The command line itself: help, mistakes, environment and completion. No command does its work."""

import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.cluster import ROOT
from unicluster import __version__
from unicluster.cli import COMMANDS, main
from unicluster.cluster.known_machines import known, remember

# For services; machines.json of an earlier run would give names too.
VARIABLES = ("UNICLUSTER_SERVER", "UNICLUSTER_MQTT", "UNICLUSTER_MQTT_FILE")


class Ended:
    """How a command ended, and what it printed."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


Run = Callable[..., Ended]


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A home of its own, and log and environment as they were."""
    monkeypatch.setenv("UNICLUSTER_HOME", str(tmp_path))
    for name in (*VARIABLES, "GRPC_TRACE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GRPC_VERBOSITY", "NONE")
    level = logging.getLogger().level
    yield
    logging.getLogger().setLevel(level)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*words: str) -> Ended:
        with pytest.raises(SystemExit) as ended:
            main(words)
        out, err = capsys.readouterr()
        return Ended(int(ended.value.code or 0), out, err)

    return run


@pytest.fixture
def completions(run: Run, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Completions of the last of the words in bash."""

    def completions(*words: str) -> list[str]:
        quoted = " ".join(f"'{word}'" for word in words)
        monkeypatch.setenv("COMP_WORDS", f"unicluster {quoted}")
        monkeypatch.setenv("COMP_CWORD", str(len(words)))
        monkeypatch.setenv("_UNICLUSTER_COMPLETE", "bash_complete")
        said = run().out.splitlines()
        monkeypatch.delenv("_UNICLUSTER_COMPLETE")
        return [line.removeprefix("plain,") for line in said if line]

    return completions


# Help


def test_the_bare_command_shows_the_help(run: Run) -> None:
    bare, asked = run(), run("--help")

    assert (bare.code, bare.err) == (0, "")
    assert bare.out == asked.out
    for name in COMMANDS:
        assert f"\n  {name} " in bare.out
    assert "Examples:" in bare.out


def test_the_version(run: Run) -> None:
    assert run("--version").out == f"unicluster {__version__}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_a_terminal_of_80_columns(run: Run, command: str) -> None:
    told = run(command, "--help")

    assert told.code == 0
    assert told.out.startswith(f"Usage: unicluster {command} ")
    assert max(len(line) for line in told.out.splitlines()) <= 80
    assert (
        f"Examples:\n  {'eval' if command == 'completion' else 'unicluster'}"
        in told.out.replace('"$(', "")
    )
    assert "\x1b" not in told.out  # in a pipe, as everywhere


def test_help_has_sections(run: Run) -> None:
    lines = run("serve", "--help").out.splitlines()

    headings = [line for line in lines if line.endswith(":") and not line.startswith(" ")]
    assert headings == [
        *("Positional arguments:", "Model:", "Generation:", "Machines:", "Network:"),
        *("HTTP:", "Telemetry:", "Other options:"),
        *("Environment, for services; the command line wins:", "Examples:"),
    ]
    wanted = [
        "--lookup",
        *["speculative", "decoding", "from", "what", "the", "text", "has", "said", "before"],
    ]
    assert wanted in [line.split() for line in lines]


@pytest.mark.parametrize("command", ["serve", "bench", "demo"])
def test_options_of_generation_are_everywhere_the_same(run: Run, command: str) -> None:
    told = run(command, "--help").out

    for flag in ("--lanes", "--kv-bits", "--draft", "--lookup", "--speculate", "--draft-tokens"):
        assert f"\n  {flag} " in told


def test_an_action_left_out_shows_the_help(run: Run) -> None:
    told = run("token")

    assert told.code == 0
    assert "rotate" in told.out


# Mistakes

MISTAKES = [
    ("srve demo", "no such command 'srve'. Did you mean 'serve'? See `unicluster --help`"),
    ("frobnicate", "no such command 'frobnicate'; see `unicluster --help`"),
    (
        "serve demo --contxt 9",
        "no such option '--contxt'. Did you mean '--context'? See `unicluster serve --help`",
    ),
    ("nodes --frobnicate", "no such option '--frobnicate'; see `unicluster nodes --help`"),
    ("serve", "missing argument 'MODEL'; see `unicluster serve --help`"),
    ("token shw", "no such command 'shw'. Did you mean 'show'? See `unicluster token --help`"),
    ("token cert", "missing argument 'DIR'; see `unicluster token cert --help`"),
    (
        "plan demo --quant q5",
        "invalid value for '--quant': 'q5' is not one of 'q2', 'q3', 'q4', 'q6', 'q8', 'none'; "
        "see `unicluster plan --help`",
    ),
    (
        "bench --users 2 few",
        "invalid value for '--users': 'few' is not a valid integer; see `unicluster bench --help`",
    ),
    ("bench --lookup", "generation options need --local N: a deployment has its own"),
    ("bench --local 2 --server a:1", "give either --local or --server"),
    (
        "completion tcsh",
        "invalid value for 'SHELL': 'tcsh' is not one of 'bash', 'zsh', 'fish'; "
        "see `unicluster completion --help`",
    ),
]


@pytest.mark.parametrize(("words", "message"), MISTAKES, ids=[words for words, _ in MISTAKES])
def test_a_mistake_is_one_line(run: Run, words: str, message: str) -> None:
    told = run(*words.split())

    assert (told.code, told.out) == (2, "")
    assert told.err == f"unicluster: {message}\n"


@pytest.mark.parametrize("words", ["--debug plan", "plan --debug"])
def test_debugging_is_asked_for_before_or_after_the_command(run: Run, words: str) -> None:
    told = run(*words.split())

    assert told.code == 2
    assert "Traceback" in told.err
    assert told.err.endswith("unicluster: no model named: `unicluster models` lists those known\n")


def test_words_after_a_double_dash_are_no_options(run: Run) -> None:
    assert "Traceback" not in run("plan", "--", "--debug").err


def test_ctrl_c_ends_with_130(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("coordinator.commands.models.entries", interrupted)

    assert run("models").code == 130


def test_a_reader_that_has_enough_sees_no_complaint() -> None:
    words = [sys.executable, "-m", "unicluster", "models", "--repos"]
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 141


CLOSE = """
import ast, os, sys
[os.close(number) for number in ast.literal_eval(sys.argv[1])]
os.execv(sys.executable, [sys.executable, "-c", *sys.argv[2:]])
"""
# In place of what else `main` does at its start: the files behind the descriptors.
LOOK = """
import os, pathlib, sys
from unicluster import cli
files = pathlib.Path(sys.argv.pop(1))
look = lambda: " ".join(os.path.realpath(f"/dev/fd/{n}") for n in range(3))
cli._set_up = lambda _: files.write_text(look())
cli.main()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="looks at files of descriptors")
@pytest.mark.parametrize("closed", [(0,), (1,), (0, 1, 2)])
def test_a_standard_file_that_was_closed_is_not_taken_by_another(
    closed: tuple[int, ...], tmp_path: Path
) -> None:
    """Printed text must not go into the next file or connection that is opened."""
    out = tmp_path / "files"
    words = [sys.executable, "-c", CLOSE, repr(closed), LOOK, str(out), "models"]
    ended = subprocess.run(words, input=b"", capture_output=True, cwd=ROOT, timeout=60, check=False)

    files = out.read_text().split()
    assert len(files) == 3
    assert [number for number in range(3) if files[number] == os.devnull] == list(closed)
    assert (ended.returncode, ended.stderr) == (0, b"")


# Environment


def test_services_set_options_in_the_environment(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNICLUSTER_JOIN_MEMORY", "lots")
    monkeypatch.setenv("UNICLUSTER_SERVE_USERS", "0")

    assert "'lots'" in run("join").err
    assert "--users 0: at least 1" in run("serve", "demo").err
    assert "--users -1: at least 1" in run("serve", "demo", "--users", "-1").err


def test_help_names_the_variables(run: Run) -> None:
    assert "UNICLUSTER_SERVE_KV_BITS" in run("serve", "--help").out
    assert "UNICLUSTER_JOIN_MEMORY" in run("join", "--help").out
    assert "UNICLUSTER_SERVER]" in run("chat", "--help").out
    assert "UNICLUSTER_MQTT]" in run("join", "--help").out


def test_a_server_in_the_environment_is_not_in_the_way(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNICLUSTER_SERVER", "studio.local:47700")

    assert "--local 0: at least 1" in run("bench", "--local", "0").err


# Completion


@pytest.fixture
def machines() -> None:
    remember({"ann": "10.0.0.1:47600", "bob": "10.0.0.2:47600"})


@pytest.mark.usefixtures("machines")
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["se"], ["serve"]),
        (["serve", "--kv"], ["--kv-bits"]),
        (["serve", "--objective", "t"], ["throughput"]),
        (["token", "ro"], ["rotate"]),
        (["serve", "deepseek-v3.1"], ["deepseek-v3.1"]),
        (["plan", "dem"], ["demo"]),
        (["serve", "demo", "--draft", "dem"], ["demo"]),
        (["plan", "--fleet", "dgx"], ["dgx-spark-128"]),
        (["plan", "--fleet", "rtx-5090-32, 2x DGX"], ["rtx-5090-32, 2x dgx-spark-128"]),
        (["plan", "--link", "ann:bob=tb"], ["ann:bob=tb4", "ann:bob=tb5"]),
        (["serve", "demo", "--nodes", "a"], ["ann"]),
        (["serve", "demo", "--nodes", "ann,"], ["ann,bob"]),
        (["drain", "--agent", ""], ["10.0.0.1:47600", "10.0.0.2:47600"]),
        (["join", "--peer", "10.0.0.2"], ["10.0.0.2:47600"]),
        (["serve", "./te"], ["file,./te"]),
        (["chat", "--trace", "a"], ["file,a"]),
        (["completion", "f"], ["fish"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_names_are_completed(
    completions: Callable[..., list[str]], words: list[str], expected: list[str]
) -> None:
    assert completions(*words) == expected


def test_machines_never_seen_have_no_names(completions: Callable[..., list[str]]) -> None:
    assert completions("serve", "demo", "--nodes", "") == []


@pytest.mark.parametrize("content", ["[1, 2", "[1, 2]", ""])
def test_a_damaged_list_of_machines_counts_as_none(
    completions: Callable[..., list[str]], tmp_path: Path, content: str
) -> None:
    (tmp_path / "machines.json").write_text(content)

    assert completions("drain", "--agent", "") == []
    assert known() == {}


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_takes_its_script(run: Run, tmp_path: Path, shell: str) -> None:
    told = run("completion", shell)
    assert told.code == 0
    assert f"_UNICLUSTER_COMPLETE={shell}_complete" in told.out

    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    (script := tmp_path / "script").write_text(told.out)
    subprocess.run([shell, "-n", str(script)], check=True, timeout=30)


def test_bash_completes_a_command(run: Run, tmp_path: Path) -> None:
    (script := tmp_path / "script").write_text(run("completion", "bash").out)
    (program := tmp_path / "unicluster").write_text(
        f'#!/bin/sh\nexec "{sys.executable}" -m unicluster "$@"\n'
    )
    program.chmod(0o755)
    typed = f"""
        source {script}
        COMP_WORDS=(unicluster har) COMP_CWORD=1
        _unicluster_completion {program}
        echo "${{COMPREPLY[*]}}"
    """

    told = subprocess.run(
        ["bash", "-c", typed], capture_output=True, text=True, cwd=ROOT, env=os.environ, timeout=60
    )

    assert told.stdout == "hardware\n"


# Speed


@pytest.mark.parametrize(
    ("words", "heavy"),
    [
        (["--help"], "grpc rich numpy cryptography zeroconf mlx coordinator node"),
        (["chat", "--help"], "mlx numpy prompt_toolkit coordinator node"),
        (["serve", "--help"], "mlx node"),
    ],
)
def test_a_command_imports_only_what_it_needs(words: list[str], heavy: str) -> None:
    program = (
        "import sys\nfrom unicluster.cli import main\n"
        f"try: main({words})\nexcept SystemExit: pass\n"
        f"print(set({heavy.split()}) & set(sys.modules), file=sys.stderr)"
    )

    told = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=60
    )

    assert told.stderr == "set()\n"
