"""docs/gguf_architectures.md: what the sweep of tiny GGUFs cuts, where, and what is not cut."""

import tomllib

from packaging.requirements import Requirement

from coordinator.models.catalog import Entry, entries
from node.ggml.cutting.architectures import KNOWN, NOT_CAUSAL, OF_MLX, REFUSED, Architecture
from tests.support.any_gguf import SPECS
from tests.support.cluster import ROOT
from tests.support.gguf_variants import VARIANTS


def gguf_architectures() -> str:
    cut = sorted(name for name, rule in KNOWN.items() if not rule.uncut)
    uncut = {name: rule.uncut for name, rule in KNOWN.items() if rule.uncut}
    lines = [
        "# Architectures of GGUFs",
        "",
        "Written by `python -m bench.pages gguf_architectures`, for llama.cpp as in",
        f"llama-cpp-python 0.3.36: {len(cut)} architectures are cut, all tried by the sweep",
        "([tests/unit/test_ggml_architectures.py](../tests/unit/test_ggml_architectures.py)): of a",
        "tiny random model of each, whose tensors and metadata llama.cpp itself asked for, the",
        "logits of prefill in two chunks and of decode past the windows are the whole file's at",
        "every cut, on a CPU bit for bit; sequences of unequal length agree with each alone to",
        "1e-3.",
        "",
        "| architecture | layers of the tiny model | where it can be cut |",
        "|---|---:|---|",
    ]
    lines += [f"| {name} | {SPECS[name].layers} | {_where(KNOWN[name])} |" for name in cut]
    lines += [
        "",
        "Variants of them are tried in the same way, at the first, the last and all cuts together:",
        "",
        *(f"- {kind}: {', '.join(names)}." for kind, names in _variants().items()),
        "",
        "Refused by the name of the key, before llama.cpp reads the file: counts, periods and",
        "arrays that can't be or contradict one another, tensors of layers that are none, windows",
        "that no layer has, and heads that differ by layer where llama.cpp takes the first layer's",
        "for all. As a stage is loaded, all tensors of its layers must take part in computing a",
        "token.",
        "",
        "These run on one machine only, as does any that is not known here, in which something may",
        "depend on a layer's number (metadata with a value for each layer is not all there is):",
        "",
        "| architecture | why it is not cut |",
        "|---|---|",
        *(f"| {name} | {reason} |" for name, reason in sorted(uncut.items())),
        "",
        "Refused:",
        "",
        *(f"- {name}: {reason}." for name, reason in sorted(REFUSED.items())),
        f"- No models of answers: {', '.join(sorted(NOT_CAUSAL))}.",
        "",
    ]
    lines += [
        "## Models of the catalogue",
        "",
        "Each engine is installed in the versions that pyproject.toml names, in which tiny models",
        "of all these kinds were tried. Both can be in one ring where MLX's layers hand on one",
        "hidden state, which is all but gemma4.",
        "",
        f"| model | MLX: {_versions('mlx-lm')} | ggml: {_versions('llama-cpp-python')} | cut |",
        "|---|---|---|---|",
        *(_model(entry) for entry in entries()),
        "",
    ]
    return "\n".join(lines)


def _versions(package: str) -> str:
    """The versions of a package that pyproject.toml names, as it does."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    needed = [*project["dependencies"], *(each for extra in extras for each in extra)]
    named = (Requirement(each) for each in needed)
    specifier = next(each.specifier for each in named if each.name == package)
    return f"{package} {','.join(sorted(map(str, specifier), reverse=True))}"


def _variants() -> dict[str, list[str]]:
    """Architectures by the kind of variant."""
    kinds: dict[str, list[str]] = {}
    for variant, (name, _) in VARIANTS.items():
        kinds.setdefault(variant.partition(": ")[2], []).append(name)
    return kinds


def _model(entry: Entry) -> str:
    name = str(entry.config["model_type"])
    gguf = OF_MLX.get(name, "")
    where = _where(KNOWN[gguf]) if gguf in KNOWN else ""
    return f"| {entry.id} | {name} | {gguf or 'not'} | {where} |"


def _where(rule: Architecture) -> str:
    parts = []
    if rule.hybrid or rule.interval:
        parts.append("each stage has attention and a recurrent state")
    if rule.distinct:
        parts.append("each stage has a windowed layer")
    if rule.every:
        parts.append(f"at multiples of {' and '.join(str(step) for step in rule.every)}")
    if rule.indexer:
        parts.append("before layers that choose what to attend to")
    if rule.leading:
        parts.append(f"after the first {rule.leading} layers")
        parts.append("each stage has attention of each compression")
    if rule.total:
        parts.append(f"no stage of {' or '.join(str(count) for count in rule.total)} layers")
    return "; ".join(parts) or "anywhere"
