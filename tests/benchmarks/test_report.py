import json

import pytest
from rich.console import Console

from benchmarks import report
from benchmarks.bench import Outcome
from benchmarks.figures import Spread
from benchmarks.gateways import BY_NAME
from benchmarks.workloads import LATENCY, UNARY


def unary_of(cpu, rss=50.0):
    return {"cpu_us": cpu, "per_second": 1e6 / cpu, "p50_ms": 1.0, "p99_ms": 2.0, "failed": 0, "rss_end_mib": rss}


OUTCOME = Outcome(
    UNARY,
    rounds={
        "direct": [unary_of(8.0)],
        "envoy_full": [unary_of(90.0), unary_of(100.0), unary_of(95.0)],
        "weir": [unary_of(60.0), unary_of(57.0), unary_of(66.0)],
    },
    missing={"litellm": "litellm ended with code 1"},
)


def document():
    gateways = [BY_NAME["direct"], BY_NAME["envoy_full"], BY_NAME["weir"]]
    return report.document([OUTCOME], gateways, {"portkey": "not installed"}, rounds=3, seconds=5)


def test_the_document_is_json_with_every_figure_its_unit_and_its_rounds():
    told = json.loads(json.dumps(document()))
    assert told["format"] == report.FORMAT
    assert told["run"] == {"rounds": 3, "seconds": 5}
    assert told["absent"] == {"portkey": "not installed"}
    assert set(told["gateways"]) == {"direct", "envoy_full", "weir"}
    unary = told["workloads"]["unary"]
    assert unary["gateways"]["weir"]["cpu_us"] == {
        "median": 60.0, "low": 57.0, "high": 66.0, "values": [60.0, 57.0, 66.0], "unit": "µs",
    }  # fmt: skip
    assert unary["gateways"]["weir"]["rss_end_mib"]["unit"] == "MiB"
    assert unary["missing"] == {"litellm": "litellm ended with code 1"}


def test_our_share_of_each_other_gateways_cpu_is_that_of_medians_and_leaves_the_base_line_out():
    assert document()["workloads"]["unary"]["weir_over"] == {"envoy_full": pytest.approx(60 / 95, abs=0.001)}


@pytest.mark.parametrize("ours", [{}, {"weir": {"p50_ms": Spread.of([1.0])}}])
def test_without_a_figure_of_ours_there_is_no_ratio(ours):
    assert report.ratios({"nginx": {"cpu_us": Spread.of([1.0])}, **ours}, "cpu_us") == {}


def test_the_machine_says_what_a_reader_needs_to_judge_by():
    assert set(report.machine()) == {"cpu", "cores", "kernel", "python", "commit"}


def test_the_table_has_medians_spreads_and_who_is_missing():
    text = shown(OUTCOME)
    assert "60.0 (57.0-66.0)" in text
    assert "litellm ended with code 1" in text


def test_what_is_added_to_the_base_line_stands_beside_the_figure():
    rounds = {"direct": [{"p50_ms": 0.020, "p99_ms": 0.1}], "nginx": [{"p50_ms": 0.130, "p99_ms": 0.5}]}
    line = next(line for line in shown(Outcome(LATENCY, rounds=rounds)).splitlines() if "nginx" in line)
    assert [cell.strip() for cell in line.split("│")[2:6]] == ["0.130", "0.110", "0.500", "0.400"]


def test_the_page_has_the_same_cells_as_the_table():
    lines = report.markdown(json.loads(json.dumps(document()))).splitlines()
    assert lines[0].startswith("### unary: ")
    assert lines[2].startswith("| gateway | CPU per request µs | ")
    assert lines[3].startswith("| --- | ---: | ")
    assert lines[6].startswith("| weir | 60.0 (57.0-66.0) | ")
    assert len({line.count("|") for line in lines[2:7]}) == 1


@pytest.mark.parametrize(
    ("spread", "digits", "expected"),
    [
        (None, 1, ""),
        (Spread.of([5.0]), 1, "5.0"),
        (Spread.of([12345.0, 12345.0]), 0, "12,345"),
        (Spread.of([1.0, 2.0, 9.0]), 2, "2.00 (1.00-9.00)"),
    ],
)
def test_a_cell_tells_the_spread_only_where_there_is_one(spread, digits, expected):
    assert report.cell(spread, digits) == expected


def shown(outcome):
    console = Console(width=200, markup=False, highlight=False)
    with console.capture() as capture:
        console.print(report.table(outcome))
    return capture.get()
