"""What an engine's process does not import.

transformers imports torch's compiler for a decorator, which takes Triton along where it is installed: 70 MB and 0.6 s
of each start, for nothing on a CPU (torch 2.13, transformers 5.24, triton 3.9).
"""

import sys


def leave_out_triton() -> None:
    """Importing it fails from now on, as where it is not installed; unless it has been imported already.

    Before torch or transformers is imported.
    """
    sys.modules.setdefault("triton", None)  # type: ignore[arg-type]  # Python's own way: docs.python.org, "The module cache"
