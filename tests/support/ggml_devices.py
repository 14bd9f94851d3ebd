"""GPUs that llama.cpp is made to believe in: its CPU under other names, registered once more.

As a program it loads a GGUF on some of them, in a process of its own, because there is no taking
them back: `ggml_devices FILE SPLITS` prints for each where each layer went, and the logits.
"""

import ctypes
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np

from node.ggml import library
from node.ggml.layers import Layers, Sizes
from node.ggml.load import open_gguf
from unicluster.checkpoints.fingerprint import whole
from unicluster.errors import StageError

# ggml-backend-impl.h: struct ggml_backend_device begins with its functions, then reg and context.
POINTERS = 17
NAME, KIND, PROPERTIES = 0, 3, 4
GPU = 1

_Name = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)
_Kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)
_Properties = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.POINTER(library._DeviceProperties))
_alive: list[object] = []


def pretend_gpu(name: str, total: int) -> None:
    """Registers a GPU of that name, of `total` bytes, which computes on the cores.

    For the rest of this process: to be called in one of its own.
    """
    cpu = next(d for d in library._handles() if not library._ggml().ggml_backend_dev_type(d))
    fake = (ctypes.c_void_p * POINTERS).from_buffer_copy(ctypes.string_at(cpu, 8 * POINTERS))
    original = _Properties(fake[PROPERTIES])
    label = ctypes.create_string_buffer(name.encode())
    address = ctypes.addressof(label)

    def properties(device: int, into: "ctypes._Pointer[library._DeviceProperties]") -> None:
        original(cpu, into)
        into.contents.name, into.contents.kind = name.encode(), GPU
        into.contents.memory_free = into.contents.memory_total = total

    functions = (_Name(lambda _: address), _Kind(lambda _: GPU), _Properties(properties))
    for slot, function in zip((NAME, KIND, PROPERTIES), functions, strict=True):
        fake[slot] = ctypes.cast(function, ctypes.c_void_p).value
    _alive.extend((fake, label, *functions))
    register = library._registry().ggml_backend_device_register
    register.restype, register.argtypes = None, [ctypes.c_void_p]
    register(ctypes.addressof(fake))


def load_on(file: Path, shares: list[tuple[str, int]]) -> dict[str, Any]:
    """Devices of each layer, of norm and lm_head last, as llama.cpp's log has them; logits."""
    said: list[str] = []
    log = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(
        lambda level, text, data: said.append(text.decode(errors="replace"))
    )
    library.llama().llama_log_set(log, None)
    gguf = open_gguf(whole(file))
    sizes = Sizes(
        layers=gguf.layers,
        hidden=gguf.hidden_size,
        cells=64,
        vocabulary=gguf.vocabulary,
        exact=True,
        devices=tuple(shares),
    )
    layers = Layers(file, sizes)
    hidden = np.random.default_rng(0).standard_normal((4, gguf.hidden_size), np.float32)
    logits = layers.forward(hidden, range(4), [0] * 4, wanted=True)
    layers.close()
    placed = re.findall(r"layer +\d+ assigned to device (\w+)", "".join(said))
    return {"placed": placed, "logits": logits.tolist()}


def main() -> None:
    for number in range(2):
        pretend_gpu(f"Fake{number}", (number + 1) << 30)
    listed = [[device.name, device.kind, device.total] for device in library.devices()]
    answers: list[dict[str, Any]] = []
    for shares in json.loads(sys.argv[2]):
        try:
            answers.append(load_on(Path(sys.argv[1]), [(name, count) for name, count in shares]))
        except StageError as error:
            answers.append({"error": str(error)})
    print(json.dumps({"devices": listed, "answers": answers}))


if __name__ == "__main__":
    main()
