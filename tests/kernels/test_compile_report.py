"""compile_report: what must fail fails, and what is registered compiles."""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from dataclasses import replace
from pathlib import Path

import pytest
import triton
import triton.language as tl

from chorus.kernels.compile_case import CompileCase
from chorus.kernels.compile_report import MODULES, TARGETS, Compiled, build, cases_of, compile_case, main, summary

BY_ARCH = {target.arch: target for target in TARGETS}


@triton.jit
def square(x_ptr, SIZE: tl.constexpr):
    offset = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    x = tl.load(x_ptr + offset)
    tl.store(x_ptr + offset, tl.dot(x, x, input_precision="ieee").to(x.dtype))


@triton.jit
def refused(x_ptr, SIZE: tl.constexpr):
    tl.store(x_ptr, tl.load(x_ptr) + tl.arange(0, SIZE))


def square_case(dtype: str, size: int, warps: int) -> CompileCase:
    return CompileCase(square, {"x_ptr": dtype}, {"SIZE": size}, warps, 2, frozenset({"x_ptr"}), expects_dot=True)


@pytest.mark.parametrize("arch", BY_ARCH)
def test_a_dot_of_bf16_becomes_a_matrix_instruction(arch: str) -> None:
    row = compile_case(square_case("*bf16", 64, 4), BY_ARCH[arch])
    assert not row.failure
    assert row.matrix
    assert row.registers > 8
    assert row.shared > 0


def test_a_dot_without_matrix_instructions_fails() -> None:
    assert compile_case(square_case("*fp32", 16, 4), BY_ARCH["sm90"]).failure.startswith("a dot did not become")


@pytest.mark.parametrize(("arch", "size", "warps"), [("sm80", 128, 1), ("hip", 256, 4)])
def test_a_spill_fails(arch: str, size: int, warps: int) -> None:
    row = compile_case(square_case("*bf16", size, warps), BY_ARCH[arch])
    assert row.spilled > 0
    assert row.failure.startswith("spills")


def test_too_much_shared_memory_fails() -> None:
    small = replace(BY_ARCH["sm90"], shared_limit=1024)
    assert "shared memory" in compile_case(square_case("*bf16", 64, 4), small).failure


def test_what_does_not_compile_is_a_failure_with_its_reason() -> None:
    case = CompileCase(refused, {"x_ptr": "*fp32"}, {"SIZE": 16}, 4, 2)
    assert compile_case(case, BY_ARCH["sm80"]).failure.startswith("does not compile: ")


def test_a_failure_is_counted_and_is_the_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good = Compiled("k", "c", "sm90", 1, 1, 0, "mma.sync", "")
    bad = good._replace(spilled=8, failure="spills 8")
    assert summary([good, bad]) == {"kernels": 1, "configs": 2, "spilled": 1, "failed": 1}
    monkeypatch.setattr("chorus.kernels.compile_report.compile_all", lambda: [good, bad])
    assert main(["--json"]) == 1
    printed = capsys.readouterr().out.splitlines()
    assert "FAILED: spills 8" in printed[-2]
    assert printed[-1] == '{"kernels": 1, "configs": 2, "spilled": 1, "failed": 1}'


def test_the_stored_table_has_the_worst_of_each_kernel_on_each_target(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    rows = [Compiled("k", "c", "sm90", 40, 64, 0, "", ""), Compiled("k", "d", "sm90", 32, 96, 0, "", "")]
    monkeypatch.setattr("chorus.kernels.compile_report.compile_all", lambda: [*rows, rows[0]._replace(arch="hip")])
    assert main(["--store", str(tmp_path / "table.md")]) == 0
    assert (tmp_path / "table.md").read_text().splitlines()[-2:] == [
        "| k | hip | 1 | 40 | 64 | 0 | 0 |",
        "| k | sm90 | 2 | 40 | 96 | 0 | 0 |",
    ]


@pytest.mark.parametrize("module", MODULES)
def test_one_configuration_of_each_kernel_passes(module: str) -> None:
    """All of them are what `make kernels-compile` is for."""
    for case in {case.name: case for case in cases_of(module, "sm90")}.values():
        assert not compile_case(case, BY_ARCH["sm90"]).failure


def test_the_debug_switch_compiles_the_assertions_in(monkeypatch: pytest.MonkeyPatch) -> None:
    from chorus.kernels.low_rank_launch import launch_options

    assert launch_options(4, 2)["debug"] is False
    monkeypatch.setenv("CHORUS_KERNELS_DEBUG", "1")
    assert launch_options(4, 2)["debug"] is True
    case = cases_of("chorus.kernels.low_rank_cases", "sm90")[0]
    plain, debug = (build(case, BY_ARCH["sm90"], debug=value).asm["ptx"] for value in (False, True))
    assert "a page lies outside of the pool" not in plain
    assert "__assertfail" not in plain
    assert "__assertfail" in debug


@pytest.mark.parametrize(
    ("kernel", "module"),
    [
        ("update_rows", "pointwise_cases"),
        ("residual_norm", "pointwise_cases"),
        ("qk_norm_rope_store", "pointwise_cases"),
        ("segment_linear", "head_cases"),
    ],
)
def test_kernels_that_read_tables_or_slots_assert_that_they_lie_inside(kernel: str, module: str) -> None:
    cases = cases_of(f"chorus.kernels.{module}", "sm90")
    case = next(c for c in cases if c.name == kernel and c.constants.get("HAS_POOL", True))
    plain, debug = (build(case, BY_ARCH["sm90"], debug=value).asm["ptx"] for value in (False, True))
    assert "__assertfail" not in plain
    assert "__assertfail" in debug
