"""How often the step thread hands its events over, so that the event loop leaves it its core.

Both threads share one interpreter, and whenever the event loop wakes the step thread waits. So tokens in the middle of
answers may wait until everybody's together have cost the event loop SHARE of its time: alone, a stream gets every token
as it comes; of 32 each gets a message every 50 ms or so. First tokens, ends, errors and all else go at once, and so
does everything when no further step is sure to come.
"""

# Handler, detokenizer, protobuf, gRPC: measured with one token a message and 32 streams, on one core of an EPYC.
MESSAGE_S = 150e-6
SHARE = 0.1
# Readers should not notice.
LONGEST_S = 0.1


def pace(streams: int) -> float:
    """Seconds between two messages of a stream when there are so many."""
    return min(streams * MESSAGE_S / SHARE, LONGEST_S)
