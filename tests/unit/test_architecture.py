"""Who may import whom, and what runs without MLX."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OURS = {"unicluster", "node", "coordinator"}
MAY_IMPORT = {"unicluster": set(), "node": {"unicluster"}, "coordinator": {"unicluster"}}
# The command, and the public `load`, stand above all packages.
ABOVE = {"unicluster/cli.py", "unicluster/api.py"}


def imported(file: Path) -> set[str]:
    """Top-level names of everything that a file imports, at whatever depth."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("package", sorted(OURS))
def test_arrows_point_one_way(package):
    for file in (ROOT / package).rglob("*.py"):
        if str(file.relative_to(ROOT)) not in ABOVE:
            others = imported(file) & OURS - {package}
            assert others <= MAY_IMPORT[package], f"{file} imports {others}"


@pytest.mark.parametrize("package", ["unicluster", "coordinator"])
def test_mlx_is_imported_only_by_nodes(package):
    for file in (ROOT / package).rglob("*.py"):
        assert not imported(file) & {"mlx", "mlx_lm"}, file


@pytest.mark.parametrize(
    "module",
    [
        "unicluster.client.client",
        "unicluster.chat.command",
        "coordinator.commands.serve",
        "coordinator.commands.nodes",
        "coordinator.commands.status",
        "coordinator.serving.metrics_port",
    ],
)
def test_client_and_coordinator_run_without_mlx(module):
    program = f"import sys\nsys.modules['mlx'] = sys.modules['mlx_lm'] = None\nimport {module}\n"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT, timeout=60)
