"""Contestants answer in turn; what is missing for one of them is said before anything is measured."""

from pathlib import Path

import pytest

from peers import vllm_cpu, work
from peers.checkout import Checkout
from peers.process import Contestant

ECHO = """
from peers.process import serve

def answer(**question):
    print("a library that talks")
    return question

serve(lambda: answer)
"""


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path


def test_a_contestant_answers_question_by_question_whatever_its_libraries_print(modules: Path) -> None:
    (modules / "echo.py").write_text(ECHO)
    contestant = Contestant("echo")
    assert contestant.ask(adapters=8, turn=1) == {"adapters": 8, "turn": 1}
    assert contestant.ask(ask="memory") == {"ask": "memory"}
    contestant.close()


def test_a_contestant_that_dies_is_an_error_and_no_figure(modules: Path) -> None:
    (modules / "dead.py").write_text("raise SystemExit(3)")
    with pytest.raises(RuntimeError, match="dead ended with exit code 3"):
        Contestant("dead")


def test_what_is_no_checkout_is_said_before_anything_runs(tmp_path: Path) -> None:
    (tmp_path / "server").mkdir()
    with pytest.raises(FileNotFoundError, match="it has no benchmarks, protos, kernels, trainer"):
        Checkout(tmp_path)


def test_another_checkouts_engine_runs_its_own_code(tmp_path: Path) -> None:
    for name in ("protos", "kernels", "server", "trainer", "benchmarks/peers"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "benchmarks/peers/process.py").write_text((Path(work.__file__).with_name("process.py")).read_text())
    program = ECHO.replace("return question", "return {**question, 'file': __file__}")
    (tmp_path / "benchmarks/peers/chorus_engine.py").write_text(program)
    contestant = Checkout(tmp_path)
    answer = contestant.ask(adapters=8, turn=1)
    contestant.close()
    file = str((tmp_path / "benchmarks/peers/chorus_engine.py").resolve())
    assert answer == {"ask": "run", "adapters": 8, "turn": 1, "file": file}


def test_without_its_environment_vllm_says_in_one_line_how_to_make_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_cpu, "PYTHON", tmp_path / "python")
    with pytest.raises(FileNotFoundError, match=r"^.*python benchmarks/peers/vllm_venv\.py.*$"):
        vllm_cpu.require()


def test_prompts_are_the_same_for_every_contestant_and_never_seen_before() -> None:
    assert work.prompts(8, 1) == work.prompts(8, 1)
    seen = {tuple(p) for adapters in work.WORKLOADS.values() for turn in range(3) for p in work.prompts(adapters, turn)}
    assert len(seen) == work.REQUESTS * len(work.WORKLOADS) * 3
    assert {len(prompt) for prompt in seen} == {work.TOKENS_IN}
