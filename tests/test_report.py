"""The report: its numbers equal arithmetic, its claims are true, and nothing that a run says can break the page."""

import io
import itertools
import json
import math
import re
from dataclasses import replace
from html import unescape

import pytest
from report_kit import OUTPUT
from rich.console import Console

from stackrace.harness.errors import UsageError
from stackrace.harness.report.charts import charts
from stackrace.harness.report.numbers import digits
from stackrace.harness.report.page import build
from stackrace.harness.report.points import by_setting, from_runs
from stackrace.harness.report.statements import sentence
from stackrace.harness.report.style import looks
from stackrace.harness.report.tables import text_table
from stackrace.harness.report.tips import tip
from stackrace.harness.store import find_runs, read_run

EVIL = "<script>alert(1)</script>&<b>x</b>"


@pytest.fixture
def page(tmp_path):
    def page():
        return build([tmp_path / "results"], tmp_path / "out" / "report.html").read_text()

    return page


def embedded(html):
    """The figures that page.js draws, tips put back as it does."""
    data = json.loads(re.search(r'<script type="application/json" id="report">(.*?)</script>', html, re.S)[1])
    for figure in data["figures"].values():
        for trace in (t for view in figure["views"].values() for p in view["panels"] for t in p["data"]):
            trace["customdata"] = [data["tips"][place] for place in trace.get("customdata", [])]
    return data


def own(html):
    """The page without plotly.js."""
    return re.sub(r"<script>.{1000000,}?</script>", "", html, flags=re.S)


def text(html):
    return unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", own(html))))


def dots(figure, colour=None):
    return [t for t in figure["data"] if t.get("mode") == "markers" and colour in (None, t["marker"]["color"])]


def test_the_embedded_numbers_equal_arithmetic(write, page):
    write(ttft=20, tpot=4, requests=20, rate=10.0)
    write(ttft=30, tpot=4, requests=20, rate=20.0)
    figures = embedded(page())["figures"]
    ttft = dots(figures["s0-ttft"]["views"]["load"]["panels"][0])
    assert [(t["meta"]["variant"], t["x"], t["y"]) for t in ttft] == [
        ("p90", [10.0, 20.0], pytest.approx([20, 30])),
        ("p50", [10.0, 20.0], pytest.approx([20, 30])),
    ]
    tpot = dots(figures["s0-tpot"]["views"]["load"]["panels"][0])
    assert tpot[1]["y"] == pytest.approx([4, 4])
    seconds = 1.9 + 0.020 + 9 * 0.004  # first due to last token
    throughput = dots(figures["s0-output_throughput"]["views"]["load"]["panels"][0])
    whole = next(t for t in throughput if t["meta"]["variant"] == "whole")
    assert whole["y"][0] == pytest.approx(20 * OUTPUT / seconds)
    frontier = dots(figures["s0-frontier"]["views"]["load"]["panels"][0])[0]
    assert frontier["x"] == pytest.approx([250, 250])
    assert frontier["y"][0] == pytest.approx(20 * OUTPUT / seconds)


def test_the_tables_hold_the_same_numbers(write, page, tmp_path):
    folder = write("mla", ttft=20, tpot=4)
    shown = text(page())
    assert "mla valid 10 128 / 10 0 20.0 20.0 20.0 4.00 4.00 4.00" in shown
    assert "steady p50" in shown
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(text_table([read_run(folder)]))
    assert re.search(r"mla +10 +128/10 +20\.0 +20\.0 +4\.00 +102 +0 +valid", console.export_text())


def test_the_closing_table_fits_80_columns_whatever_went_wrong(write, tmp_path):
    write("mla_mha", rate=100.0, context=16384, requests=2, repeat=1)
    write("mla", rate=100.0, error=EVIL * 5)
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(text_table(read_run(f) for f in find_runs(tmp_path / "results")))
    told = console.export_text()
    assert re.search(r"mla_mha +100 +16,384/10 +1 +20\.0 +- +4\.00 +[\d.]+ +0 +valid", told)
    assert "…" not in told
    assert "failed mla at 100 req/s:" in told
    assert EVIL * 5 in re.sub(r"\s", "", told)


def test_percentiles_that_too_few_requests_carry_are_left_out_and_said_so(write, points):
    write(requests=20)
    chart = charts(points(), looks(["a"]))[0]
    assert list(chart.choices) == ["all", "p50", "p90"]
    assert "p99 left out: too few requests a run." in chart.notes


def test_points_that_are_not_valid_are_hollow_and_say_why(write, page):
    write(rate=1.0)
    write(rate=2.0, verdict="suspect", reasons=["send lag p99 is 9 ms"])
    write(rate=4.0, unjudged=True)
    dot = dots(embedded(page())["figures"]["s0-ttft"]["views"]["load"]["panels"][0])[-1]
    assert dot["marker"]["symbol"] == ["circle", "circle-open", "circle-open"]
    assert [(t["outcome"], t["reasons"]) for t in dot["customdata"]] == [
        ("valid", []),
        ("suspect", ["send lag p99 is 9 ms"]),
        ("unknown", ["its validity was never judged"]),
    ]


def test_a_failed_point_is_in_the_table_with_its_error_and_never_drawn(write, page):
    write(rate=1.0)
    write(rate=2.0, error="EngineDied: out of memory")
    write(rate=4.0)
    html = page()
    assert "failed EngineDied: out of memory 2 128 / 10 0 - -" in text(html)
    traces = embedded(html)["figures"]["s0-ttft"]["views"]["load"]["panels"][0]["data"]
    line = next(t for t in traces if t["mode"] == "lines" and t["meta"]["variant"] == "p50")
    assert (line["x"], line["y"][1]) == ([1.0, 2.0, 4.0], None)  # a gap, no zero
    assert dots({"data": traces})[-1]["x"] == [1.0, 4.0]


def test_a_killed_run_is_in_the_table_and_not_drawn(write, page):
    write(rate=1.0)
    write(rate=2.0, killed=True)
    html = page()
    assert "killed the harness died before the point was over" in text(html)
    assert dots(embedded(html)["figures"]["s0-ttft"]["views"]["load"]["panels"][0])[-1]["x"] == [1.0]


def test_only_a_failed_run(write, page):
    write(error="boom")
    html = page()
    assert embedded(html)["figures"] == {}
    assert "No valid points: nothing can be claimed." in text(html)
    assert "failed boom" in text(html)


def test_repeats_are_dots_and_the_line_joins_the_medians_of_the_valid_ones(write, points):
    for repeat, ttft in enumerate((10, 20, 60)):
        write(ttft=ttft, repeat=repeat)
    write(ttft=900, repeat=3, verdict="invalid")
    figure = charts(points(), looks(["a"]))[0].views[0].panels[0].figure
    line = next(t for t in figure["data"] if t["mode"] == "lines" and t["meta"]["variant"] == "p50")
    assert line["y"] == pytest.approx([20])
    assert dots(figure)[-1]["y"] == pytest.approx([10, 20, 60, 900])


def test_contexts_are_panels_with_one_shared_axis_and_x_can_be_the_context(write, points):
    for context, rate in itertools.product((128, 1024, 4096), (1.0, 2.0)):
        write(context=context, rate=rate, ttft=context // 16)
    by_load, by_context = charts(points(), looks(["a"]))[0].views
    assert [p.title for p in by_load.panels] == ["128 input tokens", "1,024 input tokens", "4,096 input tokens"]
    assert [p.title for p in by_context.panels] == ["1 req/s", "2 req/s"]
    assert dots(by_context.panels[0].figure)[-1]["x"] == [128, 1024, 4096]
    assert by_load.axes["log"]["range"] == by_context.axes["log"]["range"]
    low, high = (10**e for e in by_load.axes["log"]["range"])
    assert low < 8 < 256 < high


def test_one_rate_and_several_contexts_are_drawn_against_context(write, points):
    write(context=128)
    write(context=1024)
    assert [v.name for v in charts(points(), looks(["a"]))[0].views] == ["context"]


def test_a_closed_loop_is_drawn_against_concurrency_without_an_offered_line(write, points):
    for concurrency in (1, 4, 16):
        write(rate=None, concurrency=concurrency)
    throughput = charts(points(), looks(["a"]))[2]
    figure = throughput.views[0].panels[0].figure
    assert figure["layout"]["xaxis"]["title"]["text"] == "concurrency"
    assert figure["layout"]["xaxis"]["ticktext"] == ["1", "4", "16"]
    assert all(t["meta"]["variant"] for t in figure["data"])


def test_the_offered_line_is_what_the_schedule_drew_times_output_tokens(write, points):
    write(rate=2.0)
    write(rate=8.0)
    figure = charts(points(), looks(["a"]))[2].views[0].panels[0].figure
    offered = next(t for t in figure["data"] if t["meta"]["variant"] is None)
    assert (offered["x"], offered["y"]) == ([2.0, 8.0], pytest.approx([100, 100]))  # every 100 ms


def test_the_slo_is_a_line_that_does_not_squash_the_rest(write, points):
    write(ttft=20)
    chart = charts(points(), looks(["a"]))[0]
    assert chart.views[0].axes["linear"]["range"][1] == pytest.approx(1.08 * 20)
    assert chart.views[0].panels[0].figure["data"][0]["y"] == [500, 500]


def test_models_are_never_mixed(write, page):
    write(model="tiny")
    write(model="large")
    html = page()
    assert {name.split("-")[0] for name in embedded(html)["figures"]} == {"s0", "s1"}
    assert "2 settings that cannot be compared with each other" in text(html)


def test_models_stand_side_by_side_where_that_was_asked(write, page):
    write(model="tiny", ttft=20, compare_models=True)
    write(model="large", ttft=40, compare_models=True)
    html = page()
    assert {name.split("-")[0] for name in embedded(html)["figures"]} == {"s0"}
    assert "tiny on a's TTFT p50 is 2.0x lower than large on a's" in text(html)


def test_other_configuration_sets_points_apart_and_is_named(write, page):
    for sigma in (0.5, 0.8):
        write(lengths={"input": {"median": 128, "sigma": sigma}, "output": {"tokens": OUTPUT}})
    assert "lengths.input.sigma=0.5" in text(page())


def test_draws_of_one_distribution_of_lengths_share_a_condition(write, points):
    lengths = {"input": {"_target_": "L", "median": 128}, "output": {"tokens": OUTPUT}}
    write("a", context=127, lengths=lengths)
    write("b", context=130, lengths=lengths)
    assert {p.condition.context for p in points()} == {128.0}
    assert len(by_setting(points())) == 1


def test_lengths_that_a_workload_has_of_its_own_are_not_mixed_with_others(write, points):
    lengths = {"input": {"tokens": 512}, "output": {"tokens": OUTPUT}}
    write("a", context=512, lengths=lengths)
    write("a", context=358 + 2 / 3, lengths=lengths, workload="azure")
    assert {p.condition.context for p in points()} == {512.0, 359.0}


def test_versions_of_one_stack_are_told_apart(write, points):
    write(print="1111111aaa")
    write(print="2222222bbb")
    assert [p.stack for p in points()] == ["a [1111111]", "a [2222222]"]


def test_nothing_is_claimed_where_the_requests_differed(write, page, points):
    write("a", ttft=20, schedule="one")
    write("b", ttft=90, schedule="another")
    assert sentence(points(), "ttft", "p50").startswith("Nothing to compare: no two stacks")
    assert "1 shared point where stacks were sent different requests: not compared." in text(page())


def test_the_tip_tells_the_steady_window_and_whether_the_load_is_sustainable(write, points):
    write(ttft=20, tpot=4, requests=20)
    (point,) = points()
    rows = {label: told for label, told, _ in tip(point)["rows"]}
    assert rows["steady window"] == "0.056 to 1.90 (from: first answer)"  # 20 + 9 * 4 ms; the last is due at 1.9 s
    assert "steady p50 20.0" in rows["TTFT"]
    assert "sustainable" not in rows
    for rule in ("never settled", "too brief"):
        grew = replace(point, sustainable=False, settled=rule, summary={})
        assert tip(grew)["rows"] == [
            ("sustainable", "no: the queue kept growing", ""),
            ("steady window", f"- ({rule})", ""),
        ]


@pytest.mark.parametrize(
    ("run", "told"),
    [
        ({"requests": 120, "ttft": 8000}, "the load never settled"),  # the first answer comes in the second half
        ({"requests": 20, "ttft": 1500}, "shorter than a request takes"),  # in the last fifth of 20
    ],
)
def test_the_closing_table_says_which_have_no_steady_window(write, tmp_path, run, told):
    write(**run)
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(text_table(read_run(f) for f in find_runs(tmp_path / "results")))
    assert f"no steady window ({told}): a at 10 req/s" in console.export_text()


def test_strings_of_a_run_cannot_break_the_page(write, page):
    write(EVIL, verdict="suspect", reasons=[EVIL])
    write("b", error=EVIL, model=EVIL)
    html = own(page())
    assert "<script>alert" not in html
    assert "<b>x</b>" not in html
    assert html.count("<script") == html.count("</script>") == 2  # the data and page.js
    tip = dots(embedded(html)["figures"]["s1-ttft"]["views"]["load"]["panels"][0])[0]["customdata"][0]
    assert (tip["title"], tip["reasons"]) == (EVIL, [EVIL])  # page.js sets it as text, never as HTML
    assert "innerHTML" not in html


def test_the_page_needs_no_network(write, page):
    write()
    html = own(page())
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", html)
    assert "default-src 'none'" in html
    assert "showSendToCloud: false" in html


def test_what_was_run_is_told_once(write, page):
    write("a", rate=1.0)
    write("a", rate=2.0)
    html = page()
    assert html.count("serve --flag &#39;a b&#39;") == 1
    shown = text(html)
    assert "Software commit abcdef1 with changes" in shown
    assert "Configuration swept: arrival.rate" in shown


def test_no_run_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match="stackrace bench"):
        build([tmp_path], tmp_path / "report.html")


def test_a_newer_schema_is_a_usage_error(write, tmp_path):
    meta = write() / "run.json"
    meta.write_text(meta.read_text().replace('"schema_version": 1', '"schema_version": 99'))
    with pytest.raises(UsageError, match="upgrade stackrace"):
        build([tmp_path / "results"], tmp_path / "report.html")


def test_stacks_of_different_divisions_share_no_chart_and_each_section_names_its_own(write, page):
    for stack, division in (("a", "tuned"), ("b", "tuned"), ("c", "matched"), ("d", None)):
        write(stack, division=division)
    html = page()
    assert html.count('<p class="answer">') == 3
    told = ("each stack tuned", "stacks with equal settings")
    assert [html.count(f"<span>{words}</span>") for words in told] == [1, 1]


def test_paths_that_overlap_count_once(write, tmp_path):
    folder = write()
    out = build([tmp_path / "results", folder], tmp_path / "report.html")
    assert "1 point: 1 valid" in text(out.read_text())


def test_figures_are_what_plotly_accepts(write, points):
    import plotly.graph_objects as go

    write("a")
    write("b", rate=20.0, verdict="suspect")
    for chart in charts(points(), looks(["a", "b"])):
        for view in chart.views:
            for panel in view.panels:
                go.Figure({**panel.figure, "layout": {**panel.figure["layout"], "yaxis": view.axes["linear"]}})


def test_looks_differ_in_colour_symbol_and_dash():
    first = list(looks([str(i) for i in range(14)]).values())
    assert len({(look.colour, look.symbol) for look in first}) == 14
    assert len({look.dash for look in first[:6]}) == 6


@pytest.mark.parametrize(
    ("value", "written"),
    [(None, "-"), (0.0, "0"), (0.0123, "0.0123"), (0.5, "0.500"), (1.234, "1.23"), (12.34, "12.3"), (1234.5, "1,234")],
)
def test_digits(value, written):
    assert digits(value) == written


def test_log_axis_spans_the_data(write, points):
    write(ttft=1)
    write(rate=20.0, ttft=400)
    axis = charts(points(), looks(["a"]))[0].views[0].axes["log"]
    assert all(axis["range"][0] <= math.log10(t) <= axis["range"][1] for t in axis["tickvals"])
    assert "100" in axis["ticktext"]


def test_a_stack_that_computes_something_else_is_called_so_everywhere(write, tmp_path):
    differs = {"verdict": "differs", "words": "computes something else: mean |Δlogp| 0.59 over 32 prefixes"}
    write("right", equivalence={"verdict": "equal", "words": "equal: mean |Δlogp| 0.002 over 32 prefixes"})
    write("wrong", ttft=1, equivalence=differs)
    runs = [read_run(f) for f in find_runs(tmp_path / "results")]
    page = build([tmp_path / "results"], tmp_path / "page.html").read_text()
    assert page.count("wrong (computes something else)") >= 3  # legend, table, provenance
    assert "right: equal: mean |Δlogp| 0.002" in unescape(page)
    assert {p.stack for p in from_runs(runs)} == {"right", "wrong (computes something else)"}
    console = Console(file=io.StringIO(), width=160)
    console.print(text_table(runs))
    assert "computes" in console.file.getvalue()
