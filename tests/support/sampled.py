"""Parameters of which a sample runs always, and all in sweeps."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def sampled(values: Iterable[Any], always: Collection[Any]) -> list[Any]:
    """`values` for `pytest.mark.parametrize`, of which all but `always` are marked `sweep`.

    Raises ValueError where one of `always` is not among them: the sample would shrink unseen.
    """
    values = list(values)
    if missing := [value for value in always if value not in values]:
        raise ValueError(f"not among the parameters: {missing}")
    sweep = pytest.mark.sweep
    return [value if value in always else pytest.param(value, marks=sweep) for value in values]
