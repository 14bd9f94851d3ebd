"""Trains the bundled demo model from nothing, on dialogues that corpus.py makes up.

    pip install "unicluster[train]"
    python -m bench.demo_model.train
    python -m bench.demo_model.train --more --rate 0.4 --steps 800

The seeds are fixed. The passes took 37 and 12 minutes on two busy Xeon cores with AMX. Of the
bundled weights, the first pass saw an earlier corpus: no `short_count`, fewer divisions.
"""

import argparse
import copy
import json
import math
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count, repeat
from pathlib import Path
from random import Random

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional

from bench.demo_model.corpus import conversation
from bench.demo_model.network import CONFIG, CONTEXT, Llama
from bench.demo_model.tokenizer import END, SPECIAL, VOCABULARY, save_tokenizer, train_tokenizer

MODEL = Path(__file__).parents[2] / "node" / "demo" / "model"
SEED = 7
CHUNK_TOKENS = 2048
LENGTHS = (16, 20, 24, 28, 32, 40, 48, 64, 80, 104, 128, 160, 224, 320, 448, 640)
IGNORED = -100

Document = tuple[list[int], list[int]]
"""A conversation's tokens and, for each, the token after it, or IGNORED where none is learned."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2600)
    parser.add_argument("--batch", type=int, default=2, help=f"times {CHUNK_TOKENS} tokens")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rate", type=float, default=1.0, help="scales the learning rates")
    parser.add_argument("--more", action="store_true", help="goes on from the model in --output")
    parser.add_argument("--output", type=Path, default=MODEL)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    torch.set_flush_denormal(True)
    options.output.mkdir(parents=True, exist_ok=True)

    rng = Random(SEED + options.more)
    model = Llama(VOCABULARY)
    if options.more:
        tokenizer = Tokenizer.from_file(str(options.output / "tokenizer.json"))
        weights = load_file(options.output / "model.safetensors")
        model.load_state_dict({n.removeprefix("model."): w for n, w in weights.items()})
    else:
        tokenizer = train_tokenizer(m["content"] for _ in range(40_000) for m in conversation(rng))
        save_tokenizer(tokenizer, options.output, CONTEXT)
        initialise(model)
    trainer = Trainer(model, options.steps, options.rate, options.threads)
    start = time.monotonic()
    stream = batches(encode(tokenizer, conversation(rng)) for _ in count())
    for step in range(options.steps):
        loss = trainer.step([next(stream) for _ in range(options.batch)])
        if step % 20 == 0:
            seconds = time.monotonic() - start
            print(f"step {step} loss {loss:.4f} seconds {seconds:.0f}", flush=True)
        if step % 500 == 499 or step == options.steps - 1:
            save(trainer, options.output)


def encode(tokenizer: Tokenizer, messages: list[dict[str, str]]) -> Document:
    """Only the assistant's words, and the end of its turn, are learned."""
    tokens: list[int] = []
    learned: list[bool] = []
    for message in messages:
        words = tokenizer.encode(message["content"].strip(), add_special_tokens=False).ids
        turn = [SPECIAL.index(f"<|{message['role']}|>"), *words, SPECIAL.index(END)]
        tokens += turn
        learned += [False] + [message["role"] == "assistant"] * (len(turn) - 1)
    targets = [t if wanted else IGNORED for t, wanted in zip(tokens, learned, strict=True)]
    return tokens[:-1], targets[1:]


def batches(documents: Iterator[Document]) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and targets of CHUNK_TOKENS each, documents of like length together.

    The few fixed shapes matter: for each new one the matrix library prepares itself anew.
    """
    waiting: dict[int, list[Document]] = {length: [] for length in LENGTHS}
    for document in documents:
        length = next((n for n in LENGTHS if len(document[0]) <= n), None)
        if length is None:
            continue  # A rare chain of long answers.
        waiting[length].append(document)
        rows = CHUNK_TOKENS // length
        if len(waiting[length]) == rows:
            inputs = torch.zeros(rows, length, dtype=torch.long)
            targets = torch.full_like(inputs, IGNORED)
            for row, (tokens, wanted) in enumerate(waiting[length]):
                inputs[row, : len(tokens)] = torch.tensor(tokens)
                targets[row, : len(wanted)] = torch.tensor(wanted)
            waiting[length] = []
            yield inputs, targets


class Trainer:
    """Holds float32 weights; the passes run on a bfloat16 copy, the fastest on these cores."""

    def __init__(self, model: Llama, steps: int, rate: float, threads: int) -> None:
        self.master = {n: p.detach().clone() for n, p in model.named_parameters()}
        # Each thread works through batches of its own, with its own gradients: on a busy machine
        # that is many times faster than splitting every small product between the threads.
        self.copies = [copy.deepcopy(model).bfloat16() for _ in range(threads)]
        self.pool = ThreadPoolExecutor(threads)
        self.steps, self.rate, self.done = steps, rate, 0
        matrices = {n: p for n, p in self.master.items() if "proj" in n}
        # Matrices of one kind have one shape: stacked, each kind is orthogonalised at once.
        self.kinds: dict[str, list[str]] = {}
        for name in matrices:
            self.kinds.setdefault(name.rsplit(".", 2)[-2], []).append(name)
        self.momentum = {
            kind: torch.zeros(len(names), *self.master[names[0]].shape)
            for kind, names in self.kinds.items()
        }
        others = [p for n, p in self.master.items() if n not in matrices]
        self.adam = torch.optim.AdamW(others, lr=1.0, betas=(0.9, 0.98), weight_decay=0.0)

    def step(self, chunks: list[tuple[Tensor, Tensor]]) -> float:
        """One update from these batches. Returns the mean loss of a learned token, in nats."""
        learned = sum(int((targets != IGNORED).sum()) for _, targets in chunks)
        shares = [chunks[i :: len(self.copies)] for i in range(len(self.copies))]
        total = sum(self.pool.map(passes, self.copies, shares, repeat(learned)))
        with torch.no_grad():
            self.update()
        return total

    def update(self) -> None:
        """Muon for the matrices, AdamW for the rest; warm-up, then a cosine down to nothing."""
        warm = min(1.0, (self.done + 1) / 60)
        rate = self.rate * warm * 0.5 * (1 + math.cos(math.pi * self.done / self.steps))
        copies = [dict(model.named_parameters()) for model in self.copies]
        gradients = {n: sum_of_gradients([c[n] for c in copies]) for n in self.master}
        for kind, names in self.kinds.items():
            gradient = torch.stack([gradients[n] for n in names])
            momentum = self.momentum[kind].lerp_(gradient, 0.05)
            change = orthogonal(gradient.lerp(momentum, 0.95))
            rows, columns = change.shape[1:]
            size = 0.02 * rate * max(1.0, rows / columns) ** 0.5
            for name, direction in zip(names, change, strict=True):
                self.master[name].mul_(1 - 0.02 * rate * 0.1).sub_(direction, alpha=size)
        for name, weight in self.master.items():
            weight.grad = gradients[name] if "proj" not in name else None
        for group in self.adam.param_groups:
            group["lr"] = 4e-3 * rate
        self.adam.step()
        for parameters in copies:
            for name, parameter in parameters.items():
                parameter.copy_(self.master[name])
                parameter.grad = None
        self.done += 1


def passes(model: Llama, chunks: list[tuple[Tensor, Tensor]], learned: int) -> float:
    """Forward and backward; the gradients stay in `model`. Returns this share of the loss."""
    total = 0.0
    for inputs, targets in chunks:
        wanted = targets != IGNORED
        hidden = model(inputs)[wanted]
        logits = functional.linear(hidden, model.embed_tokens.weight).float()
        loss = functional.cross_entropy(logits, targets[wanted], reduction="sum") / learned
        loss.backward()
        total += loss.item()
    return total


def sum_of_gradients(copies: list[Tensor]) -> Tensor:
    total = torch.zeros_like(copies[0], dtype=torch.float32)
    for parameter in copies:
        if parameter.grad is not None:
            total += parameter.grad
    return total


def initialise(model: Llama) -> None:
    """Each layer starts by adding nothing to the stream."""
    for name, parameter in model.named_parameters():
        if "o_proj" in name or "down_proj" in name:
            torch.nn.init.zeros_(parameter)
        elif "proj" in name:
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
        elif "embed" in name:
            torch.nn.init.normal_(parameter, std=0.05)


def orthogonal(matrices: Tensor) -> Tensor:
    """The nearest orthogonal matrices, roughly: Newton-Schulz as in Muon (Jordan et al., 2024)."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = (matrices.mT if tall else matrices).bfloat16()
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return (x.mT if tall else x).float()


def save(trainer: Trainer, folder: Path) -> None:
    """Writes the weights and configurations in the layout that mlx-lm loads."""
    end = SPECIAL.index(END)
    config = {**CONFIG, "vocab_size": VOCABULARY, "eos_token_id": end, "pad_token_id": end}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    generation = {"eos_token_id": [end], "pad_token_id": end, "do_sample": False}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    weights = {f"model.{name}": weight.contiguous() for name, weight in trainer.master.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "mlx"})


if __name__ == "__main__":
    main()
