"""S-LoRA's workload has the facts that are known of it; its figures are what their definitions say."""

import json
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

import serving_plots
from charts import Chart, round_up
from loads.figures import Outcome, figures
from loads.trace import BASE, Workload


def many(**options: float) -> Workload:
    return Workload(**{"rate": 100, "duration": 400, "adapters": 200, **options})  # type: ignore[arg-type]


def test_the_same_workload_is_the_same_trace() -> None:
    assert many().arrivals() == many().arrivals()
    assert many(seed=43).arrivals() != many().arrivals()


@pytest.mark.parametrize(("alpha", "share"), [(0.1, 0.59), (0.3, 0.20), (0.6, 0.04), (1.0, 0.005)])
def test_the_top_adapter_of_200_gets_its_share(alpha: float, share: float) -> None:
    counts = Counter(arrival.adapter for arrival in many(alpha=alpha).arrivals())
    assert counts[0] / 40_000 == pytest.approx(share, abs=0.007 if alpha < 1 else 0.0015)
    assert all(0 <= adapter < 200 for adapter in counts)
    assert alpha == 1.0 or counts.most_common(1)[0][0] == 0


@pytest.mark.parametrize("cv", [1.0, 4.0])
def test_gaps_have_the_mean_and_the_variation_that_were_asked_for(cv: float) -> None:
    gaps = np.diff([arrival.at for arrival in many(cv=cv).arrivals()])
    assert gaps.mean() == pytest.approx(1 / 100, rel=0.08)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.08)


def test_lengths_are_uniform_without_the_higher_end() -> None:
    for lengths in ([a.tokens_in for a in many().arrivals()], [a.tokens_out for a in many().arrivals()]):
        assert (min(lengths), max(lengths)) == (8, 511)
        assert np.mean(lengths) == pytest.approx(259.5, rel=0.02)


def test_without_adapters_all_requests_are_for_the_base() -> None:
    assert {arrival.adapter for arrival in many(adapters=0).arrivals()} == {BASE}


def test_figures_are_those_of_a_run_computed_by_hand() -> None:
    outcomes = [
        Outcome(due=0.0, sent=0.0, messages=[(1.0, 1), (2.0, 4), (5.0, 4)]),
        Outcome(due=1.0, sent=1.5, messages=[(10.0, 1)], adapter_wait=0.1),
        Outcome(due=2.0, sent=2.0, error="RESOURCE_EXHAUSTED"),
    ]
    row = figures(outcomes)
    assert (row["requests"], row["completed"], row["errors"]) == (3, 2, {"RESOURCE_EXHAUSTED": 1})
    assert row["seconds"] == 10.0
    assert row["requests_s"] == pytest.approx(0.2)
    assert row["output_tokens_s"] == pytest.approx(1.0)
    assert row["first_token_mean"] == pytest.approx(5.0)  # 1 s, and 9 s from when it was due
    assert row["inter_token_mean"] == pytest.approx(0.5)  # 8 tokens after the first, 4 s; the other has only one
    assert row["attainment"] == pytest.approx(1 / 3)
    assert row["satisfaction"] == pytest.approx((1 - 1 / 36) / 3)
    assert row["waited_for_adapter"] == 0.5


def test_plots_show_the_runs_that_were_measured_last(tmp_path: Path) -> None:
    rows = [
        {"run": run, "kind": "run", "completed": 1, "rate": rate, "adapters": n, "requests_s": rate / (n + 1) * run,
         "first_token_p99": 0.01 * rate}
        for run in (1, 2) for rate in (5.0, 10.0) for n in (0, 1, 50)
    ]  # fmt: skip
    rows.append({"run": 2, "kind": "tiers"})
    results = tmp_path / "serving.jsonl"
    results.write_text("".join(json.dumps(row) + "\n" for row in rows))
    charts = serving_plots.charts(serving_plots.last_runs(results.read_text().splitlines()))
    assert charts["throughput"].lines["1 adapter"] == [(5.0, 5.0), (10.0, 10.0)]
    assert charts["latency"].lines["base"] == [(5.0, 50.0), (10.0, 100.0)]
    assert charts["tax"].lines["10 req/s"] == [(0, 1.0), (1, 0.5), (50, pytest.approx(1 / 51))]

    serving_plots.main(results, tmp_path)
    assert sorted(path.name for path in tmp_path.glob("*.svg")) == [
        "serving_latency.svg", "serving_tax.svg", "serving_throughput.svg",
    ]  # fmt: skip


def test_a_chart_is_svg_with_a_line_for_each_series_inside_its_frame() -> None:
    svg = Chart("a < b", "x", "y", {"one": [(0, 0), (10, 99)], "two": [(5, 50)]}).svg()
    root = ElementTree.fromstring(svg)
    lines = [element for element in root if element.tag.endswith("polyline")]
    points = [tuple(map(float, point.split(","))) for line in lines for point in line.attrib["points"].split()]
    assert len(lines) == 2
    assert all(0 <= x <= 480 and 0 <= y <= 300 for x, y in points)


@pytest.mark.parametrize(("value", "end"), [(99.0, 100.0), (100.0, 100.0), (0.031, 0.04), (1.2, 1.5), (0.0, 1.0)])
def test_axes_end_at_round_values(value: float, end: float) -> None:
    assert round_up(value) == pytest.approx(end)
