"""Generates `unicluster/v1/` from the .proto files here; `--check` compares instead."""

import os
import sys
import tempfile
from pathlib import Path

import grpc_tools
from grpc_tools import protoc

HERE = Path(__file__).parent
OUTPUT = Path("unicluster/v1")


def generate(root: Path) -> None:
    """Writes the stubs of every .proto file below `root`/unicluster/v1."""
    sources = sorted(str(p.relative_to(HERE)) for p in HERE.rglob("*.proto"))
    well_known = Path(grpc_tools.__file__).parent / "_proto"
    arguments = [
        "protoc",
        f"-I{HERE}",
        f"-I{well_known}",
        f"--python_out={root}",
        f"--mypy_out=quiet:{root}",
        f"--grpc_python_out={root}",
        f"--mypy_grpc_out=quiet:{root}",
    ]
    # The plugins sit beside this interpreter, whether or not its environment is activated.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    if protoc.main([*arguments, *sources]) != 0:
        sys.exit("proto: protoc failed; its message is above")


def stale(fresh: Path, committed: Path) -> list[str]:
    """Names of files that differ between two folders of generated code."""
    names = {p.name for d in (fresh, committed) for p in d.glob("*_pb2*.py*")}
    return sorted(
        name
        for name in names
        if not (fresh / name).exists()
        or not (committed / name).exists()
        or (fresh / name).read_bytes() != (committed / name).read_bytes()
    )


def main() -> None:
    repository = HERE.parent
    if sys.argv[1:] == ["--check"]:
        with tempfile.TemporaryDirectory() as scratch:
            generate(Path(scratch))
            old = stale(Path(scratch) / OUTPUT, repository / OUTPUT)
        if old:
            sys.exit(f"proto: not fresh, run `make proto`: {', '.join(old)}")
    else:
        generate(repository)


if __name__ == "__main__":
    main()
