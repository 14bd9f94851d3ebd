"""SmolLM2-135M-Instruct cut before every layer, beside the whole file: `python -m bench.cuts`.

    python -m bench.cuts [--tokens 24] [--cuts 1 15 29]

Two stages of llama.cpp in this process compute a prompt and an answer, whose tokens are those that
the whole file chooses. Of each cut it prints how many of them the stages choose too, the largest
difference of logits, and of a token that differs its margin: the whole file's logit of its own
token over that of theirs.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from node.ggml.load import load, open_gguf
from node.ggml.stage_file import Part
from tests.support.ggml_stages import Hop, Tiny, make, through
from tests.support.real_model import MISSING, gguf_file
from unicluster.checkpoints.fingerprint import whole

# Ids that any vocabulary of 49,152 has.
PROMPT = [504, 3575, 282, 4649, 314, 7042, 30, 378, 314, 260, 2240, 3197, 281, 260, 905, 284]


class Uncut(Hop):
    """The file itself, as llama.cpp loads it: with its own embedding."""

    def __init__(self, model: Tiny) -> None:
        part = Part(0, model.gguf.layers, has_lm_head=True, context=256, users=1)
        self.index = 0
        self.stage = load(model.gguf, model.folder, model.file, part).stage
        self.session = self.stage.open(0, last=True)


def answer(hops: Sequence[Hop], tokens: list[int], count: int) -> list[Any]:
    """Logits of the tokens after the prompt: with `tokens` fed, or those chosen where they end."""
    logits = through(list(hops), [PROMPT], 1, make())[0][-1]
    found = [logits]
    for step in range(count - 1):
        token = tokens[step] if step < len(tokens) else int(logits.argmax())
        logits = through(list(hops), [[token]], 1)[0][-1]
        found.append(logits)
    return found


def compared(wanted: list[Any], got: list[Any]) -> tuple[int, float, list[float]]:
    """Equal choices, the largest difference of logits, and the margins of the others."""
    margins = [
        float(theirs.max() - theirs[int(ours.argmax())])
        for theirs, ours in zip(wanted, got, strict=True)
        if theirs.argmax() != ours.argmax()
    ]
    pairs = zip(wanted, got, strict=True)
    largest = max(float(np.abs(theirs - ours).max()) for theirs, ours in pairs)
    return len(wanted) - len(margins), largest, margins


def measure(file: Path, tokens: int, cuts: list[int]) -> int:
    """Prints a line for each cut; returns how many tokens of all cuts differ."""
    differ = 0
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder) / file.name
        here.symlink_to(file)
        model = Tiny(here, open_gguf(whole(here)), Path(folder))
        count = model.gguf.layers
        uncut = Uncut(model)
        wanted = answer([uncut], [], tokens)
        chosen = [int(logits.argmax()) for logits in wanted]
        uncut.stage.close()
        print(f"{'cut':>4} {'same':>9} {'logits':>10}  margins of others")
        for cut in cuts or range(1, count):
            hops = model.stages(0, cut, count, users=1)
            same, largest, margins = compared(wanted, answer(hops, chosen, tokens))
            for hop in hops:
                hop.stage.close()
            for stage in (Path(folder) / "stages").iterdir():
                stage.unlink()
            differ += len(margins)
            shown = " ".join(f"{margin:.4f}" for margin in margins)
            print(f"{cut:>4} {same:>4}/{tokens:<4} {largest:>10.2e}  {shown}", flush=True)
    return differ


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--cuts", type=int, nargs="*", default=[])
    args = parser.parse_args()
    file = gguf_file()
    if file is None:
        sys.exit(MISSING)
    differ = measure(file, args.tokens, args.cuts)
    print(f"{differ} tokens differ")


if __name__ == "__main__":
    main()
