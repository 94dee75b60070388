"""Our engine as another checkout of this repository has it: what a change did, on a machine whose speed changes by the
minute. Two runs one after the other can not tell."""

import os
import subprocess
from pathlib import Path
from typing import Any

from peers.process import Answer, Contestant

ROOTS = ("benchmarks", "protos", "kernels", "server", "trainer")


class Checkout(Contestant):
    """The engine of the checkout `root`, run by this environment's Python with its packages.

    Raises:
        FileNotFoundError: `root` is no checkout of ours.
    """

    def __init__(self, root: Path, *arguments: str) -> None:
        if missing := [name for name in ROOTS if not (root / name).is_dir()]:
            raise FileNotFoundError(f"{root}: no checkout of Chorus, it has no {', '.join(missing)}")
        paths = os.pathsep.join(str(root.resolve() / name) for name in ROOTS)
        super().__init__("peers.chorus_engine", *arguments, environment={"PYTHONPATH": paths})

    @staticmethod
    def commit_of(root: Path) -> str:
        """
        Raises:
            subprocess.CalledProcessError: git knows no commit of it.
        """
        return subprocess.check_output(["git", "rev-parse", "--short=12", "HEAD"], cwd=root, text=True).strip()

    def ask(self, **question: Any) -> Answer:
        return super().ask(ask="run", **question)
