"""`chorus demo` tells its whole story, exits 0, and leaves nothing behind."""

import os
import subprocess

import psutil

from support.server import CHORUS


def test_the_demo_holds_what_it_says_and_leaves_nothing() -> None:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*CHORUS, "demo", "--prompts", "8"], capture_output=True, text=True, env=env, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr
    for claim in ("One batch:", "Held-out accuracy", "24 of 24 answers equal", "All of it holds."):
        assert claim in done.stdout
    left = [p for p in psutil.process_iter(["cmdline"]) if "chorus-demo-" in " ".join(p.info["cmdline"] or ())]
    assert not left
