"""What only a process of its own can show: settings that hold for the whole process."""

import subprocess
import sys
from pathlib import Path

THREADS_OF_A_STEP = """
import socket, sys, threading
from pathlib import Path
from chorus.config import ServerConfig
from chorus.engine.process import _build

_build(ServerConfig(threads=3, state_dir=Path(sys.argv[1])), socket.socket())
import torch
thread = threading.Thread(target=lambda: print(torch.get_num_threads()))
thread.start()
thread.join()
"""


def test_a_step_runs_on_as_many_threads_as_the_operator_says(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", THREADS_OF_A_STEP, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["3"]
