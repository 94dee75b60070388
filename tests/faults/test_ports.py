"""Fault 33, ports: a start on a port that somebody has fails clearly, and takes nothing from them."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from chorus.client import Client
from support.server import ServerProcess, run_command
from support.worlds import PROMPT, TinyWorld

FREE = {"--port": "0", "--admin-port": "0", "--metrics-port": "0"}


def test_taken_port_is_one_line_that_names_it_and_its_flag_and_exit_code_1(
    calm: ServerProcess, client: Client, world: TinyWorld, tmp_path: Path
) -> None:
    taken = {"--port": calm.inference, "--admin-port": calm.admin, "--metrics-port": calm.metrics}

    def start(flag: str) -> tuple[int, list[str], str]:
        ports = {**FREE, flag: taken[flag].rpartition(":")[2]}
        options = [text for pair in ports.items() for text in pair]
        done = run_command("serve", "--model", str(world.base), "--state-dir", str(tmp_path / flag), *options)
        return done.returncode, done.stderr.splitlines(), done.stdout

    with ThreadPoolExecutor(len(taken)) as threads:
        for flag, (code, complaint, output) in zip(taken, threads.map(start, taken), strict=True):
            assert code == 1, complaint
            assert len(complaint) == 1, complaint
            assert taken[flag] in complaint[0]
            assert f" {flag}" in complaint[0]
            assert output == ""
    # Calls still reach the server that was there first: all of them, over new connections.
    for _ in range(10):
        with calm.client() as newcomer:
            assert len(newcomer.generate(PROMPT, max_tokens=1).token_ids) == 1
            assert newcomer.residency().totals.kv_blocks_total > 0
    assert "chorus_build_info" in calm.scrape().names
