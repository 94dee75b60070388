"""What the engine tells the front end, from what it knows inside."""

from collections.abc import Iterator

from chorus.adapters.checks import CheckOutcome
from chorus.engine import messages as m
from chorus.engine.evaluate import Drawn
from chorus.engine.schedule import Sampled
from chorus.errors import ChorusError


def told(sampled: Sampled, drawn: Drawn | None) -> Iterator[m.Event]:
    """What the front end hears of a sequence's new token, or of the end of one that asked for none."""
    seq, finish = sampled
    if seq.sampling.prompt_logprobs is not None and len(seq.output) <= 1:
        yield m.PromptLogprobs(seq.request_id, tuple(seq.prompt_logprobs))
    logprobs = (drawn.logprob,) if drawn and drawn.logprob else ()
    yield m.Tokens(seq.request_id, tuple(seq.output[-1:]), finish, seq.index, logprobs, first=len(seq.output) == 1)


def checked(outcome: CheckOutcome) -> m.Event:
    """What came of an uploaded folder's check."""
    found = outcome.found
    if not isinstance(found, ChorusError):
        return m.Checked(outcome.check_id, found)
    fields = tuple((violation.field, violation.description) for violation in found.violations)
    return m.CheckFailed(outcome.check_id, found.code, found.reason, found.message, found.retry_after_s, fields)


def failed(request_id: int, error: ChorusError) -> m.Failed:
    """A request's end with an error."""
    return m.Failed(request_id, error.code, error.reason, error.message, error.retry_after_s)
