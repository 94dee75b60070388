"""A contestant is a process of its own that answers questions in turn: one JSON object a line, in and out.

Its Python may be another environment's, so nothing else passes between them. What libraries print goes to stderr.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).resolve().parents[1]

Answer = dict[str, Any]


class Contestant:
    """The asking side: starts `python -m MODULE ARGUMENTS...`, which calls `serve`.

    Raises:
        RuntimeError: the process ended instead of answering; its stderr says why.
    """

    def __init__(
        self,
        module: str,
        *arguments: str,
        python: str = sys.executable,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._module = module
        paths = [str(BENCHMARKS), *filter(None, [os.environ.get("PYTHONPATH")])]
        self._process = subprocess.Popen(
            [python, "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), **(environment or {})},
        )
        self._read()  # it is ready

    def ask(self, **question: Any) -> Answer:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        """Ends the process: it sees the end of its input."""
        self._process.communicate()

    def _read(self) -> Answer:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.communicate()
            raise RuntimeError(f"{self._module} ended with exit code {self._process.returncode}")
        answer: Answer = json.loads(line)
        return answer


def serve(make: Callable[[], Callable[..., Answer]]) -> None:
    """The answering side: `make` builds what answers, with a question's fields as keyword arguments."""
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)
        answer = make()
        print("{}", file=answers, flush=True)
        for line in sys.stdin:
            print(json.dumps(answer(**json.loads(line))), file=answers, flush=True)
