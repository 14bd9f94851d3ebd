"""An answer as gateway and client hold it: all that another head needs to go on with it."""

from array import array

from unicluster.chat_limits import MOST_TOKENS
from unicluster.errors import StageError
from unicluster.v1.chat_pb2 import Begun, GenerateEvent, GenerateRequest, Resume

# Events of the text of one token: it may end a call and begin another, and the like.
MOST_HELD = 4096


class Transcript:
    """The prompt's tokens and those of the answer, as its client has them.

    Takes the events of one head after another. What a head says is checked: it may be damaged.
    """

    def __init__(self, request: GenerateRequest, who: str = "the head") -> None:
        """`request` is sent to the first head, and has to ask for a Begun. who: in errors."""
        self._request = request
        self._who = who
        self._prompt: array[int] | None = None
        self._tokens = array("I")
        self._cached_tokens = 0
        self._most_reasoning: int | None = None
        if request.HasField("resume"):
            self._prompt = array("I", request.token_ids)
            self._tokens = array("I", request.resume.token_ids)
            self._cached_tokens = request.resume.cached_tokens
            if request.reasoning.HasField("most_tokens"):
                self._most_reasoning = request.reasoning.most_tokens
        self._held: list[GenerateEvent] = []
        self._begun = False
        # Tokens that the head that goes on computes again, and those that its caches had.
        self.replayed = self.cached = 0
        self.finished = False
        self._sent = False  # text of a head that did not say what it computes

    @property
    def count(self) -> int:
        """Tokens that the client has."""
        return len(self._tokens)

    @property
    def can_resume(self) -> bool:
        """Whether the answer can go on elsewhere: an older head does not say what its prompt is."""
        return self._prompt is not None or not self._sent

    def request(self) -> GenerateRequest:
        """The request to the next head: for the whole answer, or for the rest of it."""
        self.drop_held()
        self._begun = False
        if self._prompt is None:
            return self._request
        request = GenerateRequest()
        request.CopyFrom(self._request)
        # A template may write the date: its prompt is the one that was answered.
        for field in ("messages", "prompt", "token_ids", "template_arguments", "reasoning"):
            request.ClearField(field)
        if self._most_reasoning is not None:
            request.reasoning.most_tokens = self._most_reasoning
        request.token_ids.extend(self._prompt)
        request.resume.CopyFrom(Resume(token_ids=self._tokens, cached_tokens=self._cached_tokens))
        return request

    def drop_held(self) -> None:
        """Forgets text whose token has not come, before it comes again."""
        self._held.clear()

    def take(self, event: GenerateEvent) -> list[GenerateEvent]:
        """The events that the client may have now: a token's text comes with the token, or not.

        Raises StageError for what no head says.
        """
        kind = event.WhichOneof("event")
        if kind == "begun":
            self._begin(event.begun)
            return []
        if kind not in ("delta", "finish"):
            raise StageError(f"{self._who} sent an event of another kind than an answer has")
        if self._prompt is not None and not self._begun and kind == "delta":
            raise StageError(f"{self._who} began the answer anew: is its version an older one?")
        if self._prompt is None:
            self._sent, self.finished = True, kind == "finish"
            return [event]
        self._held.append(event)
        if kind == "delta" and not event.delta.token_ids:
            if len(self._held) > MOST_HELD:
                raise StageError(f"{self._who} sent {MOST_HELD} pieces of text without a token")
            return []
        self._tokens.extend(event.delta.token_ids)
        if len(self._tokens) > MOST_TOKENS:
            raise StageError(f"{self._who} sent more than {MOST_TOKENS} tokens")
        self.finished = kind == "finish"
        ready, self._held = self._held, []
        return ready

    def _begin(self, begun: Begun) -> None:
        prompt = begun.prompt_token_ids
        total = len(prompt or self._prompt or ()) + len(self._tokens)
        first = self._prompt is None
        if self._begun or bool(prompt) != first or len(prompt) > MOST_TOKENS:
            raise StageError(f"{self._who} began an answer that it has begun")
        if begun.cached_tokens >= total:
            raise StageError(f"{self._who} has more tokens in its caches than there are")
        self._begun = True
        if first:
            self._prompt, self._cached_tokens = array("I", prompt), begun.cached_tokens
            if begun.HasField("most_reasoning_tokens"):
                self._most_reasoning = begun.most_reasoning_tokens
        else:
            self.replayed, self.cached = total - begun.cached_tokens, begun.cached_tokens
