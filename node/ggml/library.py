"""The parts of llama.cpp's C interface that are used here, by way of llama-cpp-python.

All of it is public (llama.h, ggml.h, ggml-backend.h) but for three things, each with a contract
test (tests/unit/test_ggml_compat.py): the layout of a tensor, as callbacks are given it, that of
what is known of a type, and in which folder llama-cpp-python has its libraries. For them
pyproject.toml pins llama-cpp-python to one version.
"""

import ctypes
import functools
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Self

import numpy as np
from gguf import GGMLQuantizationType

from unicluster.errors import StageError, UnavailableError, in_one_line
from unicluster.system.versions import advice, installed

log = logging.getLogger("unicluster.llama")

PACKAGE = "llama-cpp-python"

F32, F16 = int(GGMLQuantizationType.F32), int(GGMLQuantizationType.F16)
MAX_DIMS, MAX_OP_PARAMS, MAX_SRC, MAX_NAME = 4, 64, 10, 64
# llama.h: enum llama_rope_type.
MULTIPLE_POSITIONS = (8, 40)
# ggml.h: levels of the log.
_LEVELS = {2: logging.DEBUG, 3: logging.DEBUG, 4: logging.WARNING}

_ERROR = 4
# What llama.cpp says before the reason: a function of its own, and that it is an error.
_PREFIX = re.compile(r"(?:\w+: )?(?:error loading model(?: \w+)*: )?")
_UNKNOWN = re.compile(r"unknown model architecture: '(.*)'")
# Lists that get the errors of the log.
_listening: list[list[str]] = []
# Lists that get all of its lines.
_noting: list[list[str]] = []
_BUFFER = re.compile(r"(?:compute|output) buffer size = +([\d.]+) MiB")

Floats = np.ndarray[Any, np.dtype[np.float32]]
# Hidden states, or token ids.
Inputs = Floats | np.ndarray[Any, np.dtype[np.int32]]


class Tensor(ctypes.Structure):
    """struct ggml_tensor of ggml.h."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * MAX_DIMS),
        ("nb", ctypes.c_size_t * MAX_DIMS),
        ("op", ctypes.c_int),
        ("op_params", ctypes.c_int32 * (MAX_OP_PARAMS // 4)),
        ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * MAX_SRC),
        ("view_src", ctypes.c_void_p),
        ("view_offs", ctypes.c_size_t),
        ("data", ctypes.c_void_p),
        ("name", ctypes.c_char * MAX_NAME),
    )


class _TypeTraits(ctypes.Structure):
    """struct ggml_type_traits of ggml.h."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
    )


class Complaint:
    """Lines of llama.cpp while something is tried: `reason` begins with ": ", or is empty."""

    def __init__(self) -> None:
        self._errors: list[str] = []

    def __enter__(self) -> Self:
        _listening.append(self._errors)
        return self

    def __exit__(self, *_: object) -> None:
        _listening.remove(self._errors)

    @property
    def reason(self) -> str:
        """Its first error, without its own names for where."""
        if not self._errors:
            return ""
        text = _PREFIX.sub("", self._errors[0], count=1) or self._errors[0]
        return f": {in_one_line(Exception(text))}"


class UnknownArchitectureError(StageError):
    """The installed llama.cpp does not have the architecture of a GGUF."""


def load_error(file: Path, complaint: Complaint) -> StageError:
    """Why llama.cpp has not loaded a file."""
    if match := _UNKNOWN.search(complaint.reason):
        missing = f"llama.cpp as in {installed(PACKAGE)} has no architecture {match[1]}"
        return UnknownArchitectureError(f"{missing}: {advice(PACKAGE)}")
    return StageError(f"llama.cpp can't load {file}{complaint.reason}")


class Buffers:
    """Sizes of the buffers that llama.cpp computes in, as it logs them while a context is made."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    def __enter__(self) -> Self:
        _noting.append(self._lines)
        return self

    def __exit__(self, *_: object) -> None:
        _noting.remove(self._lines)

    @property
    def nbytes(self) -> int:
        """Bytes on all devices together: the log has them in hundredths of MiB, rounded."""
        sizes = [float(m[1]) + 0.005 for line in self._lines if (m := _BUFFER.search(line))]
        return int(sum(sizes) * 2**20)


class _DeviceProperties(ctypes.Structure):
    """struct ggml_backend_dev_props of ggml-backend.h."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("description", ctypes.c_char_p),
        ("memory_free", ctypes.c_size_t),
        ("memory_total", ctypes.c_size_t),
        ("kind", ctypes.c_int),
        ("device_id", ctypes.c_char_p),
        ("caps", ctypes.c_bool * 4),
        ("later", ctypes.c_uint8 * 64),  # room for what newer versions may add
    )


def tensor_name(address: int) -> bytes:
    """The name of the ggml_tensor at an address; cheaper than all of it."""
    return ctypes.string_at(address + Tensor.name.offset)


def tensor_sources(address: int) -> list[int]:
    """Addresses of the tensors that the ggml_tensor at an address is computed of."""
    return [source for source in Tensor.from_address(address).src if source]


def tensor_elements(address: int) -> int:
    """How many numbers the ggml_tensor at an address has."""
    return prod(Tensor.from_address(address).ne)


@functools.cache
def llama() -> Any:
    """llama-cpp-python's low-level module, with its backends loaded.

    Raises UnavailableError when it is not installed.
    """
    try:
        from llama_cpp import llama_cpp as module
    except (ImportError, OSError, RuntimeError) as error:
        raise UnavailableError(
            "this machine has no llama.cpp: on it, pip install 'unicluster[ggml]', then join again"
        ) from error
    module.llama_log_set(_on_log, ctypes.c_void_p(0))
    module.llama_backend_init()
    return module


def library_folder() -> Path:
    """Where libllama and the libraries it has loaded are."""
    return Path(llama()._lib._name).parent


def shared_library(name: str) -> Any:
    """One of llama.cpp's libraries, such as `ggml-base`, which is loaded if it is not yet.

    Raises UnavailableError where it was built without that.
    """
    files = (f for f in sorted(library_folder().glob(f"*{name}.*")) if _is_named(f, name))
    if (file := next(files, None)) is None:
        raise UnavailableError(f"{library_folder()}: llama.cpp was built without {name}")
    return ctypes.CDLL(str(file))


def _is_named(file: Path, name: str) -> bool:
    return file.name.partition(".")[0].removeprefix("lib") == name


@functools.cache
def _log_callback() -> Any:
    def note(level: int, text: bytes, _data: Any) -> None:
        line = text.decode(errors="replace").strip()
        if line and level in _LEVELS:
            log.log(_LEVELS[level], "%s", line)
        for lines in _noting:
            lines.append(line)
        if line and level == _ERROR:
            for errors in _listening:
                errors.append(line)

    return ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(note)


_on_log = _log_callback()


@functools.cache
def _ggml() -> Any:
    """libggml-base, which libllama has loaded."""
    library = shared_library("ggml-base")
    library.ggml_get_type_traits.restype = ctypes.POINTER(_TypeTraits)
    library.ggml_get_type_traits.argtypes = [ctypes.c_int]
    for copy in (library.ggml_backend_tensor_get, library.ggml_backend_tensor_set):
        copy.restype = None
        copy.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]
    library.ggml_backend_dev_name.restype = ctypes.c_char_p
    library.ggml_backend_dev_name.argtypes = [ctypes.c_void_p]
    library.ggml_backend_dev_type.restype = ctypes.c_int
    library.ggml_backend_dev_type.argtypes = [ctypes.c_void_p]
    library.ggml_backend_dev_get_props.restype = None
    library.ggml_backend_dev_get_props.argtypes = [
        ctypes.c_void_p,
        ctypes.POINTER(_DeviceProperties),
    ]
    return library


@functools.cache
def _registry() -> Any:
    """libggml, which knows the backends."""
    library = shared_library("ggml")
    library.ggml_backend_dev_count.restype = ctypes.c_size_t
    library.ggml_backend_dev_get.restype = ctypes.c_void_p
    library.ggml_backend_dev_get.argtypes = [ctypes.c_size_t]
    return library


def to_floats(raw: bytes, kind: int, count: int) -> Floats:
    """The numbers that `raw` stands for in ggml's type number `kind`, as ggml itself reads them."""
    if kind == F32:
        return np.frombuffer(raw, np.float32, count)
    floats = np.empty(count, np.float32)
    convert = _ggml().ggml_get_type_traits(kind).contents.to_float
    convert(raw, floats.ctypes.data, count)
    return floats


def read_tensor(address: int, into: int, nbytes: int) -> None:
    """Copies the contents of a tensor from the device it is on."""
    _ggml().ggml_backend_tensor_get(address, into, 0, nbytes)


def write_tensor(address: int, source: int, nbytes: int) -> None:
    """Gives a tensor other contents."""
    _ggml().ggml_backend_tensor_set(address, source, 0, nbytes)


@functools.cache
def amx_is_broken() -> bool:
    """Whether llama.cpp's AMX instructions for Intel Xeons may crash.

    `_tile_loadconfig` of GCC 12 tells the compiler that 8 of the 64 bytes are read, so that the
    rest may never be written. A library compiled without AMX doesn't list it.
    """
    return b"AMX_INT8 = 1" in llama().llama_print_system_info()


@dataclass(frozen=True)
class Listed:
    """A device as llama.cpp lists it.

    kind: gpu (with memory of its own), igpu (in the host's), cpu, or other. pci: its address in
    lower case, "" where it has none. free, total: bytes, as the backend sees them.
    """

    name: str
    description: str
    kind: str
    pci: str
    free: int
    total: int


# ggml-backend.h: enum ggml_backend_dev_type.
_CPU = 0
_KINDS = {_CPU: "cpu", 1: "gpu", 2: "igpu"}


def devices() -> list[Listed]:
    """Devices of llama.cpp: GPUs first, the CPU last."""
    listed = [_listed(device) for device in _handles()]
    return sorted(listed, key=lambda device: device.kind == "cpu")


def _handles() -> list[int]:
    """Addresses of llama.cpp's devices."""
    llama()
    registry = _registry()
    return [
        int(registry.ggml_backend_dev_get(index))
        for index in range(registry.ggml_backend_dev_count())
    ]


def device_count() -> int:
    """Number of llama.cpp's devices, that of the CPU among them."""
    return len(_handles())


def _listed(device: int) -> Listed:
    properties = _DeviceProperties()
    _ggml().ggml_backend_dev_get_props(device, ctypes.byref(properties))
    return Listed(
        name=properties.name.decode(errors="replace"),
        description=properties.description.decode(errors="replace"),
        kind=_KINDS.get(properties.kind, "other"),
        pci=(properties.device_id or b"").decode(errors="replace").lower(),
        free=int(properties.memory_free),
        total=int(properties.memory_total),
    )


def gpu_handles(names: Sequence[str]) -> list[int]:
    """Addresses of the devices of these names, without that of the CPU.

    Raises StageError for a name that no device has.
    """
    # By name and kind alone: asked for its memory, a backend may begin to use a card.
    library = _ggml()
    named = {library.ggml_backend_dev_name(device).decode(): device for device in _handles()}
    if missing := [name for name in names if name not in named]:
        there = ", ".join(named)
        raise StageError(f"llama.cpp has no device {missing[0]} here any more: it has {there}")
    handles = [named[name] for name in names]
    return [device for device in handles if library.ggml_backend_dev_type(device) != _CPU]


def computes_on_cpu(names: Sequence[str] = ()) -> bool:
    """Whether a stage on the devices of these names, or llama.cpp's own choice, is on the CPU."""
    if names:
        return not gpu_handles(names)
    library = _ggml()
    kinds = {_KINDS.get(library.ggml_backend_dev_type(device)) for device in _handles()}
    return not kinds & {"gpu", "igpu"}
