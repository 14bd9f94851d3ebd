"""Layer outputs: trees of arrays in tuples, lists, dicts and plain objects."""

import copy
from collections.abc import Callable, Iterator
from itertools import zip_longest
from typing import Any

import mlx.core as mx
import mlx.nn as nn

Path = tuple[Any, ...]


def is_object(value: Any) -> bool:
    """True for an instance with attributes of its own, such as a record of residuals."""
    return hasattr(value, "__dict__") and not (
        callable(value) or isinstance(value, nn.Module | mx.array | mx.Dtype)
    )


def is_mutable(value: Any) -> bool:
    """True for a container that a layer can write to."""
    return isinstance(value, dict | list) or is_object(value)


def children(value: Any) -> Iterator[tuple[Any, Any]]:
    """(key, part) of each part of a container or object; nothing for a leaf."""
    if isinstance(value, dict):
        yield from value.items()
    elif isinstance(value, list | tuple):
        yield from enumerate(value)
    elif is_object(value):
        yield from vars(value).items()


def arrays(value: Any, path: Path = ()) -> Iterator[tuple[Path, mx.array]]:
    """(path, array) of each array in a tree."""
    if isinstance(value, mx.array):
        yield path, value
    for key, part in children(value):
        yield from arrays(part, (*path, key))


def replace_arrays(value: Any, change: Callable[[Path, mx.array], Any], path: Path = ()) -> Any:
    """Replaces each array by `change(path, array)`, in place in lists, dicts and objects."""
    if isinstance(value, mx.array):
        return change(path, value)
    changed = [(key, replace_arrays(part, change, (*path, key))) for key, part in children(value)]
    if isinstance(value, tuple):
        parts = [part for _, part in changed]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    write(value, dict(changed))
    return value


def write(target: Any, parts: dict[Any, Any]) -> None:
    """Sets the parts of a list, dict or object."""
    if is_object(target):
        vars(target).update(parts)
    elif isinstance(target, list):
        target[:] = [parts[index] for index in sorted(parts)]
    elif isinstance(target, dict):
        target.update(parts)


def pack(value: Any, keep: Callable[[Path], bool], path: Path = ()) -> Any:
    """The tree as lists and dicts that can be sent; arrays without `keep` become None."""
    if isinstance(value, mx.array):
        return value if keep(path) else None
    if isinstance(value, list | tuple):
        return [pack(part, keep, (*path, key)) for key, part in enumerate(value)]
    if isinstance(value, dict) or is_object(value):
        return {str(key): pack(part, keep, (*path, key)) for key, part in children(value)}
    return value


def unpack(packed: Any, like: Any) -> Any:
    """The tree again, with the tuples and objects of `like`, a tree of the same origin."""
    if packed is None:
        return None
    if isinstance(like, list | tuple):
        parts = [unpack(p, old) for p, old in zip_longest(packed, like)]
        return parts if isinstance(like, list) else tuple(parts)
    if isinstance(packed, dict) and (isinstance(like, dict) or is_object(like)):
        old = dict(children(like))
        parts_by_name = {key: unpack(part, old.get(key)) for key, part in packed.items()}
        if isinstance(like, dict):
            return parts_by_name
        new = copy.copy(like)
        vars(new).update(parts_by_name)
        return new
    return packed


def skeleton(value: Any) -> Any:
    """A copy of the tree with None for its arrays."""
    if isinstance(value, mx.array):
        return None
    parts = {key: skeleton(part) for key, part in children(value)}
    if isinstance(value, list | tuple):
        return [*parts.values()] if isinstance(value, list) else tuple(parts.values())
    if isinstance(value, dict):
        return parts
    if is_object(value):
        new = copy.copy(value)
        vars(new).update(parts)
        return new
    return value


def find(value: Any, path: Path) -> Any:
    """The part at a path, in the tree or in its packed form; None if there is none."""
    for key in path:
        parts = {str(name): part for name, part in children(value)}
        value = parts.get(str(key))
    return value


def put(value: Any, path: Path, part: Any) -> Any:
    """Replaces the part at a path, in place in lists, dicts and objects; returns the tree."""
    if not path:
        return part
    parts = dict(children(value))
    parts[path[0]] = put(parts.get(path[0]), path[1:], part)
    if isinstance(value, tuple):
        return tuple(parts.values())
    write(value, parts)
    return value
