"""What only a process of its own can show: settings that hold for the whole process."""

import subprocess
import sys
from pathlib import Path

import pytest

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


WHAT_STAYS = """
import gc, socket, sys, threading
from pathlib import Path
from chorus.config import ServerConfig
from chorus.engine.process import _serve
from chorus.engine.wire import Frames, Start, frame, from_engine

ours, theirs = socket.socketpair()
ours.sendall(frame(Start(ServerConfig(state_dir=Path(sys.argv[1])).model_dump_json())))
threading.Thread(target=_serve, args=(theirs,)).start()
(ready,) = Frames(from_engine).feed(ours.recv(1 << 16))
print(type(ready).__name__, gc.get_freeze_count() > 100_000, flush=True)
ours.close()
"""


def test_collections_do_not_look_at_what_an_engine_started_with(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", WHAT_STAYS, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["Ready", "True"]


WHAT_CAME = """
import socket, sys
from pathlib import Path
from chorus.config import ServerConfig
from chorus.engine.process import _build

_build(ServerConfig(threads=1, state_dir=Path(sys.argv[1])), socket.socket())
print(*(name for name, module in sys.modules.items() if name.split(".")[0] == "triton" and module))
"""


def test_triton_stays_out_of_an_engine_on_a_cpu(tmp_path: Path) -> None:
    """Of all that it imports nothing needs it. Transformers would bring it along."""
    pytest.importorskip("triton")
    command = [sys.executable, "-c", WHAT_CAME, str(tmp_path)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.split() == []


WHAT_CAME_IN_FRONT = """
import sys
import chorus.models.checkpoint, chorus.models.tokenizer, chorus.services.assembly, chorus.services.server
from chorus.models.tokenizer import load_tokenizer

assert load_tokenizer(chorus.models.checkpoint.base_folder(None))
print(*sorted({"transformers.modeling_utils", "torch._dynamo", "triton", "numba"} & sys.modules.keys()))
"""


def test_a_front_end_does_without_models_and_compilers() -> None:
    """It has the tokenizer and no model; they would take 100 MB and a core for two seconds while the engine starts."""
    command = [sys.executable, "-c", WHAT_CAME_IN_FRONT]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.split() == []
