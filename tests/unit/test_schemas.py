"""Two hundred schemas: whatever is chosen among the allowed tokens is valid JSON of its schema."""

import json
import random
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.utils import load_tokenizer

from node.constraints.build import constraint_of
from node.constraints.vocabulary import Vocabulary
from tests.support.schemas import resolved, schemas
from unicluster.v1.chat_pb2 import Constraint, GenerateRequest

DEMO = Path(__file__).parents[2] / "node" / "demo" / "model"
COUNT = 200
MOST_TOKENS = 3000
SCHEMAS = [resolved(schema) for schema in schemas(COUNT)]


@cache
def vocabulary() -> Vocabulary:
    return Vocabulary(load_tokenizer(DEMO))


def answer(schema: Any, seed: int) -> str:
    """Text of tokens chosen at random among the allowed ones, its end whenever that is allowed."""
    request = GenerateRequest(constraint=Constraint(json_schema=json.dumps(schema)))
    constraint = constraint_of(request, vocabulary(), "normal", 0)
    assert constraint is not None
    tokenizer, rng = vocabulary().tokenizer, random.Random(seed)
    ends = sorted(tokenizer.eos_token_ids)
    tokens: list[int] = []
    while len(tokens) < MOST_TOKENS:
        logits = constraint(mx.array(tokens), mx.zeros((1, len(tokenizer))))
        allowed = np.flatnonzero(np.array(logits[0]) == 0)
        assert constraint.error is None
        assert len(allowed)
        if np.isin(ends, allowed).any():
            return str(tokenizer.decode(tokens))
        tokens.append(int(rng.choice(allowed)))
    raise AssertionError(f"no end after {MOST_TOKENS} tokens: {tokenizer.decode(tokens)[:200]!r}")


def assert_valid(schema: Any, text: str) -> None:
    jsonschema.validate(
        json.loads(text), schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER
    )


@pytest.mark.parametrize("number", range(0, COUNT, 20))
def test_a_random_answer_is_valid(number: int) -> None:
    assert_valid(SCHEMAS[number], answer(SCHEMAS[number], seed=number))


@pytest.mark.sweep
@pytest.mark.parametrize("number", range(COUNT))
def test_random_answers_are_valid(number: int) -> None:
    for seed in range(3):
        assert_valid(SCHEMAS[number], answer(SCHEMAS[number], seed))
