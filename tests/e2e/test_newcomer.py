"""A newcomer's way through the README: serve their own folder, push, chat, batch, train a third; and wrong turns."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from chorus.models import embedded
from support.server import CHORUS, ENVIRONMENT, ServerProcess
from support.tiny import save_adapter, save_base

TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}"


class Desk:
    """The newcomer's folder, and the server that runs in it."""

    def __init__(self, folder: Path, server: ServerProcess) -> None:
        self.folder, self.server = folder, server

    def chorus(self, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, **ENVIRONMENT}
        return subprocess.run(
            [*CHORUS, *arguments],
            cwd=self.folder,
            env=environment,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    def refused(self, *arguments: str) -> str:
        """The one line that a command ends in."""
        done = self.chorus(*arguments)
        assert done.returncode != 0, done.stdout
        assert "Traceback" not in done.stderr
        lines = done.stderr.strip().splitlines()
        assert len(lines) == 1, done.stderr
        return lines[0]


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    folder = tmp_path_factory.mktemp("newcomer")
    model = shutil.copytree(embedded.path(), folder / "my-model")
    (model / "chat_template.jinja").write_text(TEMPLATE)
    save_adapter(model, folder / "my-adapter", 1, r=4, target_modules=["q_proj", "v_proj"])
    save_adapter(model, folder / "my-adapter-2", 2, r=8)
    save_adapter(model, folder / "too-high", 3, r=256)
    save_adapter(save_base(folder / "other-base", "llama"), folder / "stranger", 4, r=4)
    examples = [{"prompt": f"Q{i} ", "completion": "yes"} for i in range(8)]
    (folder / "train.jsonl").write_text("".join(json.dumps(e) + "\n" for e in examples))
    (folder / "requests.jsonl").write_text('{"id": "a", "prompt": "My parcel"}\n{"prompt": "Hello", "max_tokens": 2}\n')
    (folder / "support.yaml").write_text(
        "base: ./my-model\ndata: {train: train.jsonl}\ntrain: {steps: 40, learning_rate: 2.0e-2, warmup_steps: 2}\n"
    )
    with ServerProcess(folder / "state", "--model", "./my-model") as server:
        yield Desk(folder, server)


def test_the_whole_way(desk: Desk) -> None:
    inference, admin = ("--server", desk.server.inference), ("--admin", desk.server.admin)
    for folder, name in (("my-adapter", "support"), ("my-adapter-2", "sales")):
        pushed = desk.chorus("adapters", "push", f"./{folder}", "--tenant", "acme", "--name", name, *admin)
        assert pushed.returncode == 0, pushed.stderr
    talk = "Where is my parcel?\n/adapter acme/sales\nWhere is my parcel?\n/quit\n"
    # Random adapters would rather say nothing.
    speak = ("--temperature", "0", "--ignore-eos", "--max-tokens", "12")
    chat = desk.chorus("chat", "--adapter", "acme/support", *speak, *inference, stdin=talk)
    assert chat.returncode == 0, chat.stderr
    assert chat.stdout.strip()
    assert "acme/sales answers from here on" in chat.stderr
    batch = ["generate", "--input", "requests.jsonl", "--output", "answers.jsonl", "--adapter", "acme/support"]
    done = desk.chorus(*batch, "--max-tokens", "8", *inference)
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in (desk.folder / "answers.jsonl").read_text().splitlines()]
    assert {answer["id"] for answer in answers} == {"a", "line-2"}
    assert all("completion" in answer for answer in answers)
    trained = desk.chorus("train", "support.yaml", "-o", "support", "--publish", desk.server.admin, "acme/third")
    assert trained.returncode == 0, trained.stderr
    ask = ["generate", "--adapter", "acme/third", "--prompt", "Q3 ", "--temperature", "0", "--max-tokens", "4"]
    answer = desk.chorus(*ask, *inference)
    assert answer.returncode == 0, answer.stderr
    assert "yes" in answer.stdout


def test_wrong_turns_end_in_one_line_that_says_what_to_do(desk: Desk) -> None:
    inference, admin = ("--server", desk.server.inference), ("--admin", desk.server.admin)
    push = ("--tenant", "acme", "--name", "wrong", *admin)
    assert re.search("another base", desk.refused("adapters", "push", "./stranger", *push))
    assert re.search("rank 256 .* limit of 128", desk.refused("adapters", "push", "./too-high", *push))
    assert "no-such-folder" in desk.refused("adapters", "push", "./no-such-folder", *push)
    assert (
        desk.chorus("adapters", "push", "./my-adapter", "--tenant", "acme", "--name", "right", *admin).returncode == 0
    )
    assert "acme/right" in desk.refused("generate", "--adapter", "acme/rihgt", "--prompt", "x", *inference)
    assert "acme/right has @live" in desk.refused(
        "generate", "--adapter", "acme/right@liev", "--prompt", "x", *inference
    )
    assert "must be HOST:PORT" in desk.refused(
        "generate", "--prompt", "x", "--server", f"http://{desk.server.inference}"
    )
    assert "no-such-file" in desk.refused(
        "generate", "--input", "no-such-file.jsonl", "--output", "o.jsonl", *inference
    )
    port = desk.server.inference.rsplit(":", 1)[1]
    taken = desk.refused("serve", "--model", "./my-model", "--state-dir", "other", "--port", port)
    assert "--port" in taken
    ports = ("--port", "0", "--admin-port", "0", "--metrics-port", "0")
    greedy = desk.refused("serve", "--kv-cache-mb", "999999999", "--state-dir", "third", *ports)
    assert re.search("--kv-cache-mb 999999999, .* MiB of this machine; grant less", greedy)
    assert "no-such-model" in desk.refused("serve", "--model", "./no-such-model", "--state-dir", "third", "--port", "0")
