"""README's tables and the operators' plots show the newest rows; a stale page is told from a fresh one."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import kernel_plots
import tables

MACHINE = {"commit": "0123456789ab", "time": "2026-01-02T03:04:05Z", "cpu": "Some CPU", "cores": 2, "gpu": None}
PEERS = {"base": "transformers", "one": "peft", "mixed8": "peft", "mixed16": "peft"}
PAGE = "Before.\n\n<!-- engine -->\nold\n<!-- /engine -->\n\n<!-- kernels -->\n<!-- /kernels -->\nAfter.\n"


def engine_row(speed: float, *, vllm: bool = False, **others: Any) -> dict[str, Any]:
    row: dict[str, Any] = {"device": "cpu", "rss_over_budgets_mb": 500.4, **MACHINE}
    for workload, peer in PEERS.items():
        row |= {f"{workload}_tok_s": speed, f"{workload}_{peer}_tok_s": 100.0, f"{workload}_over_{peer}": speed / 100}
        if vllm:
            row |= {f"{workload}_vllm_tok_s": 80.0, f"{workload}_over_vllm": speed / 80}
    return row | others


def timed(**seconds: float) -> dict[str, Any]:
    return {"seconds": seconds, "gb_s": 12.34, "floor_over_time": 0.567}


def kernel_row(device: str = "cpu", **ops: Any) -> dict[str, Any]:
    return {"device": device, "read_gb_s": 29.4, **MACHINE, **ops}


def swept(run: int, rows: int, share: float) -> dict[str, Any]:
    case = {"case": f"8x8 rows {rows}", "shape": "8x8", "rows": rows, "adapters": rows, "ranks": [16]}
    times = {"seconds": {"chorus": 1e-5, "base linears": 2e-5}, "floor": share * 1e-5, "floor_over_time": share}
    return {"device": "cuda", "run": run, "op": "low_rank", **case, **times, **MACHINE, "gpu": "Some GPU"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "README.md").write_text(PAGE)
    (tmp_path / "engine.jsonl").write_text(json.dumps(engine_row(123.0)) + "\n")
    (tmp_path / "kernels.jsonl").write_text(json.dumps(kernel_row(low_rank=timed(chorus=0.01))) + "\n")
    return tmp_path


def draw(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, tables.__file__, "--readme", str(folder / "README.md"), "--results", str(folder)]
    return subprocess.run([*command, *options], capture_output=True, text=True, check=False)


def test_a_newer_row_makes_the_page_stale_until_it_is_drawn(folder: Path) -> None:
    assert draw(folder).returncode == 0
    assert draw(folder, "--check").returncode == 0
    with (folder / "engine.jsonl").open("a") as results:
        results.write(json.dumps(engine_row(456.0)) + "\n")
    before = (folder / "README.md").read_text()
    stale = draw(folder, "--check")
    assert stale.returncode == 1
    assert "stale: engine; run python benchmarks/tables.py" in stale.stderr
    assert (folder / "README.md").read_text() == before
    assert draw(folder).returncode == 0
    page = (folder / "README.md").read_text()
    assert "| base | 456 | 100 (transformers) | 4.56 |" in page
    assert "123" not in page.replace("0123456789ab", "")


def test_what_is_outside_the_markers_stays() -> None:
    drawn = tables.redraw(PAGE, "engine", "| new |")
    assert drawn == PAGE.replace("old", "| new |")


@pytest.mark.parametrize("page", ["none", "<!-- engine -->", "<!-- /engine --><!-- engine -->", PAGE + PAGE])
def test_a_page_without_its_markers_is_refused(page: str) -> None:
    with pytest.raises(ValueError, match="want one <!-- engine --> and after it one <!-- /engine -->"):
        tables.redraw(page, "engine", "")


def test_the_engines_table_has_columns_for_what_its_row_has() -> None:
    ranges = {"one_over_peft_range": [1.9, 2.2]}
    full = engine_row(200.0, vllm=True, decode_efficiency_base=0.71, decode_efficiency_mixed16=0.62, **ranges)
    lines = tables.engine_tables([full]).splitlines()
    assert lines[0] == (
        "| 2 CPU cores (Some CPU), tokens/s | Chorus | peer | Chorus / peer (range over pairs) | vLLM | Chorus / vLLM "
        "| decode step: floor/time |"
    )
    assert lines[2] == "| base | 200 | 100 (transformers) | 2.00 | 80 | 2.50 | 0.71 |"
    assert lines[3] == "| 1 adapter | 200 | 100 (peft) | 2.00 (1.90..2.20) | 80 | 2.50 |  |"
    assert lines[-1].startswith("Peak resident memory over weights and configured budgets: 500 MB.")
    assert tables.engine_tables([engine_row(200.0)]).splitlines()[2] == "| base | 200 | 100 (transformers) | 2.00 |"


def test_a_row_without_peers_does_not_take_the_place_of_one_with_them() -> None:
    alone = {"device": "cpu", "base_tok_s": 999.0, **MACHINE}
    assert tables.engine_tables([engine_row(200.0), alone]) == tables.engine_tables([engine_row(200.0)])


def test_a_cpu_on_which_peers_run_in_float32_has_a_table_of_its_own() -> None:
    other = engine_row(300.0, peer_dtype="float32", cpu="Another")
    first, second = engine_row(100.0), engine_row(200.0)
    drawn = tables.engine_tables([first, other, second])
    assert drawn == f"{tables.engine_tables([second])}\n\n{tables.engine_tables([other])}"
    assert drawn.splitlines()[9].startswith("| 2 CPU cores (Another), tokens/s | Chorus | peer (float32) |")


def test_a_cpu_with_amx_has_a_table_of_its_own_and_the_first() -> None:
    plain, with_tiles = engine_row(100.0), engine_row(200.0, cpu="Some CPU amx_bf16 avx512_bf16")
    drawn = tables.engine_tables([with_tiles, plain])
    assert drawn == f"{tables.engine_tables([with_tiles])}\n\n{tables.engine_tables([plain])}"


def test_zen_5_has_a_table_of_its_own() -> None:
    """It multiplies twice as fast as Zen 4, so one's row would say nothing of the other."""
    four, five = engine_row(100.0), engine_row(200.0, cpu="Some CPU family 26 avx512_bf16")
    drawn = tables.engine_tables([five, four])
    assert drawn == f"{tables.engine_tables([five])}\n\n{tables.engine_tables([four])}"


def test_the_operators_table_has_the_newest_row_of_each_operator() -> None:
    old = kernel_row(low_rank=timed(chorus=0.5), paged_attention={"128": timed(chorus=0.002, SDPA=0.003)})
    lines = tables.kernel_tables([old, kernel_row(low_rank=timed(chorus=0.01, loop=0.05))]).splitlines()
    assert lines[2:4] == [
        "| `low_rank`, 16 adapters of rank 16, all linears | 10.00 ms | 12.3 | 0.57 | loop 5.00 |",
        "| `paged_attention`, 16 decodes, 128 tokens | 2.00 ms | 12.3 | 0.57 | SDPA 1.50 |",
    ]


def test_a_cpu_on_which_others_run_in_float32_has_operators_of_its_own() -> None:
    first = kernel_row(low_rank=timed(chorus=0.5))
    other = kernel_row(paged_attention={"128": timed(chorus=0.002)}, peer_dtype="float32", page=16, cpu="Another")
    drawn = tables.kernel_tables([first, other])
    assert drawn.startswith(tables.kernel_tables([first]))
    assert "(Another), reads" in drawn
    assert "others, times ours (float32) |" in drawn
    assert "`paged_attention`, 16 decodes, 128 tokens, pages of 16 |" in drawn


def test_the_last_sweep_on_a_gpu_is_a_table_of_its_own() -> None:
    drawn = tables.kernel_tables([swept(1, 4, 0.1), swept(2, 4, 0.5), swept(2, 16, 0.6)])
    assert drawn.splitlines() == [
        "| `low_rank` on Some GPU | time | floor | floor/time | others, times ours |",
        "| --- | --- | --- | --- | --- |",
        "| 8x8 rows 4 | 10.0 us | 5.0 us | 0.50 | base linears 2.00 |",
        "| 8x8 rows 16 | 10.0 us | 6.0 us | 0.60 | base linears 2.00 |",
        "",
        "Commit 0123456789ab, 2026-01-02.",
    ]


def test_plots_show_attention_over_context_and_the_last_sweep(tmp_path: Path) -> None:
    attention = {"128": timed(chorus=0.002, SDPA=0.003), "512": timed(chorus=0.004, SDPA=0.008)}
    rows = [kernel_row(paged_attention=attention), swept(1, 4, 0.1), swept(2, 4, 0.5), swept(2, 16, 0.6)]
    over_context, over_rows = kernel_plots.attention_chart(rows, "vectors"), kernel_plots.low_rank_chart(rows)
    assert over_context is not None
    assert over_context.lines == {"chorus": [(128.0, 2.0), (512.0, 4.0)], "SDPA": [(128.0, 3.0), (512.0, 8.0)]}
    assert over_rows is not None
    assert over_rows.lines == {"8x8": [(4.0, 0.5), (16.0, 0.6)]}
    results = tmp_path / "kernels.jsonl"
    results.write_text("".join(json.dumps(row) + "\n" for row in rows))
    kernel_plots.main(results, tmp_path)
    assert sorted(path.name for path in tmp_path.glob("*.svg")) == ["kernels_attention.svg", "kernels_low_rank.svg"]
