"""How often a stream is written to, so that messages leave the step thread its core.

A message costs this process about MESSAGE_S of the interpreter that the step thread needs too. All streams together
may take SHARE of it: alone, a stream gets every token as it comes; of 32 each gets a message every 50 ms or so.
"""

# Handler, protobuf, gRPC: measured with one token a message and 32 streams, on one core of an EPYC.
MESSAGE_S = 150e-6
SHARE = 0.1
# Readers should not notice.
LONGEST_S = 0.1


def pace(streams: int) -> float:
    """Seconds between two messages of a stream when there are so many."""
    return min(streams * MESSAGE_S / SHARE, LONGEST_S)
