"""No C++ compiler runs while an answer is sampled: a new temperature would wait for it."""

import os
import subprocess
import sys
from pathlib import Path

# A process of its own has its kernels where TMPDIR says: there are none yet.
PROGRAM = """
import sys
from pathlib import Path
import mlx.core as mx
from node.generation.sampling import Sampling

mx.set_default_device(mx.cpu)
before = mx.random.normal((1, 700))
for dtype in (mx.float32, mx.bfloat16, mx.float16):
    logprobs = before.astype(dtype) - mx.logsumexp(before.astype(dtype), axis=-1, keepdims=True)
    for temperature in (0.6, 0.7, 1.3):
        for more in ({}, {"top_p": 0.9}, {"min_p": 0.1}, {"top_k": 40}, {"top_p": 0.7, "top_k": 3}):
            sampler = Sampling(temperature=temperature, seed=3, **more).sampler()
            assert 0 <= sampler(logprobs).item() < 700
print([file.name for file in Path(sys.argv[1]).rglob("*.so")])
"""


def test_sampling_compiles_nothing(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)],
        env={**os.environ, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "[]", done.stderr
