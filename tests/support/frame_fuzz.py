"""Made-up frames for one stage: mostly such as a head sends, now and then with a number changed."""

import random
from collections.abc import Callable
from typing import Any

from tests.support.stage_head import StageHead, leaf, op
from unicluster.errors import StageError
from unicluster.v1.stage_pb2 import CacheOp, CacheState, Frame
from unicluster.v1.tensor_pb2 import Leaf

NUMBERS = (0, 1, 2, 3, 7, 255, 300, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**62)
MOST_OPERATIONS = 40  # in a session: with more a session of llama.cpp has no sequences left


class FrameFuzz:
    """Sessions one after the other, each of them until an error ends it or it is long.

    `served` and `refused` count frames. `wild`: how often a number is one of NUMBERS.
    """

    def __init__(
        self,
        heads: Callable[[], StageHead],
        seed: int,
        *,
        wild: float = 0.03,
    ) -> None:
        self.served = 0
        self.refused = 0
        self._random = random.Random(seed)
        self._wild = wild
        self._heads = heads
        self._saved: list[CacheState] = []
        self._begin()

    def step(self) -> None:
        """One frame. Raises whatever is no StageError, which no frame may lead to."""
        frame = self._frame()
        operations = frame.parts[0].ops[:]
        try:
            self._head.serve(frame)
        except StageError:
            self.refused += 1
            self.restart()
            return
        self.served += 1
        for done in operations:
            self._note(done)
        if frame.reports[0].state.kind:
            self._saved.append(frame.reports[0].state)
            del self._saved[:-20]
        self._length += 1
        if self._length > MOST_OPERATIONS:
            self.restart()

    def restart(self) -> None:
        """Ends the session, with all its caches, and begins another."""
        self.end()
        self._begin()

    def end(self) -> None:
        self._head.end()

    def _begin(self) -> None:
        self._head = self._heads()
        self._rows: dict[int, int] = {}
        self._snapshots: dict[int, tuple[int, int]] = {}
        self._tokens: dict[int, int] = {}
        self._held: list[int] = []
        self._length = 0
        self._last = 0

    def _frame(self) -> Frame:
        if self._held and self._random.random() < 0.1:
            number = self._number(self._held.pop())
            return self._head.frame(claim=number)
        if not self._rows or self._random.random() < 0.5:
            return self._head.frame(self._operation())
        cache = self._random.choice(list(self._rows))
        tokens = self._random.choice((1, 1, 1, 2, 5, 17))
        hold = self._random.random() < 0.2
        rows = self._number(self._rows[cache], most=64)
        hidden = [leaf(self._head.inputs(rows, tokens))]
        frame = self._head.frame(cache=self._number(cache), hidden=hidden, hold=hold)
        self._tokens[cache] = self._tokens.get(cache, 0) + tokens
        if hold:
            self._held.append(frame.id)
        if self._random.random() < self._wild:
            self._change(frame.hidden[0])
        return frame

    def _operation(self) -> CacheOp:
        names = [field.name for field in CacheOp.DESCRIPTOR.oneofs_by_name["op"].fields]
        name = "make" if not self._rows else self._random.choice(names)
        cache = self._any()
        rows = self._rows.get(cache, 1)
        match name:
            case "make":
                return op(self._new(), name)
            case "merge":
                single = [number for number, count in self._rows.items() if count == 1]
                count = self._random.randint(1, 3)
                sources = self._random.sample(single, min(count, len(single)))
                return op(self._new(), name, sources=[self._number(one) for one in sources])
            case "filter":
                remaining = self._random.sample(range(rows), self._random.randint(1, rows))
                return op(cache, name, rows=[self._number(row, most=2**32) for row in remaining])
            case "extend":
                return op(cache, name, other=self._any())
            case "extract":
                row = self._number(self._random.randrange(rows), most=2**32)
                return op(self._new(), name, source=cache, row=row)
            case "prepare":
                longest = self._random.randint(1, 9)
                lengths = [self._random.randint(1, longest) for _ in range(rows)]
                padding = [longest - length for length in lengths]
                changed = [self._number(length, most=2**63) for length in lengths]
                return op(cache, name, lengths=changed, right_padding=padding)
            case "trim":
                tokens = self._random.randint(0, min(self._tokens.get(cache, 0), 3))
                return op(cache, name, tokens=self._number(tokens))
            case "copy" | "snapshot":
                return op(self._new(), name, source=cache)
            case "fetch":
                entry = self._number(0, most=2**32)
                most = self._random.choice((0, 0, 100, 2**20))
                return op(cache, name, entry=entry, offset=self._number(0), most_bytes=most)
            case "store":
                return self._store()
            case "quantize":
                bits = self._number(self._random.choice((4, 8)), most=2**32)
                return op(self._new(), name, source=cache, bits=bits, group_size=32)
            case "restore" if self._snapshots:
                number, (of, tokens) = self._random.choice(list(self._snapshots.items()))
                since = max(self._tokens.get(of, 0) - tokens, 0)
                return op(self._number(of), name, snapshot=number, tokens=self._number(since))
            case _:
                return op(cache, name)

    def _store(self) -> CacheOp:
        made = op(self._last, "store")
        if self._saved:
            saved = self._random.choice(self._saved)
            made.store.kind = saved.kind
            made.store.state.extend(saved.state)
            if saved.state and self._random.random() < 0.7:
                self._change(self._random.choice(made.store.state))
            if self._random.random() < 0.3:
                whole = CacheState(kind=saved.kind, state=made.store.state).SerializeToString()
                size = self._random.randint(1, len(whole))
                more = self._random.random() < 0.3
                made.store.CopyFrom(CacheOp.Store(part=whole[:size], more=more))
        return made

    def _change(self, changed: Leaf) -> None:
        """Changes one thing about a leaf."""
        if not changed.HasField("tensor"):
            changed.json = self._random.choice(("null", "true", '"x"', "1e9", "-1", "[]", "3", "{"))
            return
        tensor, choice = changed.tensor, self._random.randrange(6)
        if choice == 0 and tensor.shape:
            tensor.shape[self._random.randrange(len(tensor.shape))] = self._any_number()
        elif choice == 1:
            tensor.dtype = self._random.choice(("int32", "float16", "bool", "uint64", "x"))
        elif choice == 2:
            changed.key = self._random.choice(("", "0", "7", "0.0", "99999999", "a.b"))
        else:  # most of all: a state of llama.cpp has integers of its own in its bytes
            data = bytearray(tensor.data or b"x")
            for _ in range(self._random.randint(1, 4)):
                near = self._random.random() < 0.7
                at = self._random.randrange(min(len(data), 200) if near else len(data))
                data[at] = self._random.choice((0, 1, 2, 127, 128, 255))
            if choice == 3:
                del data[self._random.randrange(len(data)) :]
                if len(tensor.shape) == 1:
                    tensor.shape[0] = len(data)
            tensor.data = bytes(data)

    def _note(self, done: CacheOp) -> None:
        """A head's view of its caches after an operation."""
        name, cache = done.WhichOneof("op"), done.cache
        made: Any = getattr(done, name or "make")
        if name in ("copy", "quantize", "extract", "snapshot"):
            tokens = self._tokens.get(made.source, 0)
            if name == "snapshot":
                self._snapshots[cache] = made.source, tokens
                return
            self._tokens[cache] = tokens
            self._rows[cache] = 1 if name == "extract" else self._rows.get(made.source, 1)
        elif name == "make":
            self._rows[cache], self._last = 1, cache
        elif name == "merge":
            self._rows[cache] = len(made.sources)
            self._tokens[cache] = max(self._tokens.get(source, 0) for source in made.sources)
        elif name == "filter":
            self._rows[cache] = len(made.rows)
        elif name == "extend":
            self._rows[cache] = self._rows.get(cache, 1) + self._rows.get(made.other, 1)
        elif name == "restore":
            self._tokens[cache] = self._tokens.get(cache, 0) - made.tokens
            del self._snapshots[made.snapshot]
        elif name == "trim":
            self._tokens[cache] = max(self._tokens.get(cache, 0) - made.tokens, 0)
        elif name == "free":
            self._rows.pop(cache, None)
            self._snapshots.pop(cache, None)

    def _any(self) -> int:
        return self._number(self._random.choice(list(self._rows) or [1]))

    def _new(self) -> int:
        used = max([0, *self._rows, *self._snapshots])
        return self._number(min(used, 2**20) + self._random.randint(1, 3))

    def _any_number(self) -> int:
        return self._random.choice(NUMBERS)

    def _number(self, number: int, most: int = 2**63) -> int:
        """`number`, or now and then another below `most`."""
        if self._random.random() < self._wild:
            return min(self._any_number(), most - 1)
        return number
