"""The report in a real browser: everything is drawn, nothing complains, nothing is fetched, in light and dark."""

import re
import shutil
import subprocess

import pytest

from stackrace.harness.records import row
from stackrace.harness.report.page import build
from stackrace.harness.store import RunWriter
from stackrace.harness.types import Record, Request, Sampling

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --enable-logging=stderr --virtual-time-budget=5000 --dump-dom"
)
MS = 1_000_000

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium")


def write(folder, stack, rate, context):
    config = {"lengths": {"input": {"tokens": context}, "output": {"tokens": 4}}, "slo": {"ttft_ms": 500}}
    asked = {"model": "tiny", "workload": "synthetic", "arrival": "poisson", "repeat": 0, "output_tokens": 4.0}
    writer = RunWriter(folder)
    writer.begin(config, {"point": {"stack": stack, "rate": rate, "input_tokens": float(context), **asked}})
    for i in range(20):
        due = i * 100 * MS
        times = [due + (context // 16 + k) * MS for k in range(4)]
        record = Record(i, due, due, due, due, times, [1] * 4, end=times[-1])
        writer.add(row(record, Request(i, (1,) * context, 4, Sampling(0, 1, 0, 0))))
    writer.end("ok", validity={"verdict": "valid", "reasons": []})


def rendered(page, tmp_path, *flags):
    """The document after its scripts ran, and what they complained about."""
    command = [CHROMIUM, *FLAGS.split(), f"--user-data-dir={tmp_path / 'profile'}", *flags, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.fixture
def page(tmp_path):
    for i, (rate, context) in enumerate((r, c) for r in (1.0, 4.0) for c in (128, 1024)):
        write(tmp_path / "results" / f"{i}", "<i>a</i>", rate, context)
    return build([tmp_path / "results"], tmp_path / "report.html")


@pytest.mark.parametrize(("scheme", "colour"), [(1, "rgb(0, 114, 178)"), (0, "rgb(86, 180, 233)")])
def test_every_panel_is_drawn_in_the_theme_in_force(page, tmp_path, scheme, colour):
    document, complaints = rendered(page, tmp_path, f"--blink-settings=preferredColorScheme={scheme}")
    assert complaints == []
    panels = re.findall(r'<div class="plot js-plotly-plot"', document)
    assert len(panels) == 8  # four charts of two contexts; the views against context wait until they are asked for
    points = re.findall(r'<path class="point plotly-customdata"[^>]*style="([^"]*)"', document)
    assert len(points) >= 2 * 2 * 4
    assert all(colour in style for style in points)


ACTS = """<script>
document.querySelector("input[name=s0-ttft-view][value=context]").click();
document.querySelector("input[name=s0-tpot-choice][value=p90]").click();
document.querySelectorAll("th button")[1].click();
document.querySelectorAll("th button")[1].click();
const plot = document.querySelector("#s0-tpot .plot");
plot.emit("plotly_hover", { points: [{ customdata: 0 }], event: { clientX: 5, clientY: 5 } });
</script>"""


def test_choosing_sorting_and_hovering(page, tmp_path):
    with page.open("a") as more:
        more.write(ACTS)
    document, complaints = rendered(page, tmp_path)
    assert complaints == []
    ttft = document[document.index('id="s0-ttft"') : document.index('id="s0-tpot"')]
    assert re.search(r'data-view="load" hidden', ttft)
    assert not re.search(r'data-view="context" hidden', ttft)
    assert len(re.findall(r'<div class="plot js-plotly-plot"', ttft)) == 4  # both views have been drawn
    body = document[document.index("<tbody") :]
    assert re.findall(r"<tr[^>]*>.*?<td data-value=\"([\d.]+)\"", body, re.S) == ["4.0", "4.0", "1.0", "1.0"]
    shown = document[document.index('id="tip"') :]
    assert "<strong>&lt;i&gt;a&lt;/i&gt;</strong><p>1 req/s · 128 in, 4 out · repeat 0</p>" in shown
    assert "<tr><td>TTFT</td><td>p50 8.00 · p90 8.00 · steady p50 8.00</td><td>ms</td></tr>" in shown
