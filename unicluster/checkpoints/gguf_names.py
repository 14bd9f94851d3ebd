"""How GGUFs are called: the quantization in a name, the parts of a file, and models by these.

A model of a hub repository of GGUFs is called `owner/name:q4_k_m`: its quantization as the files
are named, in small letters.
"""

import re
from collections.abc import Iterable

from unicluster.errors import InputError, NotFoundError

_MODEL = re.compile(r"([\w.-]+/[\w.-]+):(\w[\w.-]*)")
# q4_k_m, iq2_xxs, tq1_0, i2_s, bf16, f16, mxfp4_moe; and before them what unsloth calls dynamic.
_QUANT = r"(?:ud-)?(?:[it]?q\d+(?:_[a-z0-9]+)*|i\d_s|bf16|fp?(?:16|32)|(?:mx|nv)fp4(?:_[a-z0-9]+)*)"
_WORD = re.compile(rf"(?<![a-z0-9]){_QUANT}(?![a-z0-9_])")
_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})(\.gguf)", re.IGNORECASE)
# What lies beside models: encoders of images, and statistics for quantizing.
_OTHER = re.compile(r"(?:^|[-._])mmproj(?:[-._]|$)|^imatrix|[-._]imatrix$")


def model_id(repo: str, quant: str) -> str:
    """How a model is called inside: a repository, and one of the quantizations in it."""
    return f"{repo}:{quant.lower()}"


def split_id(model: str) -> tuple[str, str]:
    """The repository and the quantization; any other model's name, and nothing."""
    match = _MODEL.fullmatch(model)
    return (match[1], match[2]) if match else (model, "")


def is_quant(word: str) -> bool:
    """Whether it is what a GGUF's weights may be called, in small letters."""
    return re.fullmatch(_QUANT, word) is not None


def parts(name: str) -> list[str]:
    """The names of all parts of a GGUF, in order; its own alone, if it was not split."""
    split = _PART.fullmatch(name)
    count = int(split[3]) if split else 0
    if split is None or not 1 <= int(split[2]) <= count:
        return [name]
    return [f"{split[1]}-{part:05}-of-{split[3]}{split[4]}" for part in range(1, count + 1)]


def quant_of(name: str) -> str:
    """The quantization of a file of weights by its name, or else its folders'; "" of others."""
    if not name.lower().endswith(".gguf"):
        return ""
    split = _PART.fullmatch(name)
    *folders, stem = (split[1] if split else name[: -len(".gguf")]).lower().split("/")
    if _OTHER.search(stem):
        return ""
    for word in (stem, *reversed(folders)):
        if words := _WORD.findall(word):
            return str(words[-1])
    return ""


def quants(names: Iterable[str]) -> list[str]:
    """All that there are among files."""
    return sorted({quant for quant in map(quant_of, names) if quant})


def chosen(model: str, names: Iterable[str]) -> list[str]:
    """The files of weights of `owner/name:quant` among all files of its repository.

    Raises NotFoundError where there is none, with those that there are, or where a part is
    missing; InputError where several models are meant.
    """
    repo, quant = split_id(model)
    here = set(names)
    first = sorted({parts(name)[0] for name in here if quant_of(name) == quant})
    if not first:
        others = ", ".join(quants(here))
        known = f"it has {others}" if others else "nor any other"
        raise NotFoundError(f"{repo}: there is no GGUF of {quant} in it: {known}")
    if len(first) > 1:
        raise InputError(
            f"{repo}: several GGUFs of {quant} are in it: {' and '.join(first)}; download the one "
            "that is meant, and serve the file"
        )
    names = parts(first[0])
    if missing := [name for name in names if name not in here]:
        raise NotFoundError(f"{repo}: of a split GGUF there is no {missing[0]}")
    return names


def check_named(repo: str, names: Iterable[str]) -> None:
    """Raises InputError, saying what to choose from, if a repository without a quantization was
    named and GGUFs are in it."""
    names = list(names)
    if known := quants(names):
        raise InputError(
            f"{repo}: its weights are GGUFs: name one, such as {repo}:{known[0]}; it has "
            f"{', '.join(known)}"
        )
    if any(name.lower().endswith(".gguf") for name in names):
        raise InputError(
            f"{repo}: its weights are GGUFs whose names have no quantization: download one, and "
            "serve the file"
        )
