"""Traces: recorded times and lengths as they stand in the file, prefixes shared where it says so, bad lines named."""

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from test_workloads import common_prefix

from stackrace.harness import schedule
from stackrace.harness.errors import UsageError
from stackrace.workloads.arrivals import Constant, Immediate, Recorded
from stackrace.workloads.trace import Trace
from stackrace.workloads.trace_formats import Azure, BurstGPT, Mooncake

DATA = Path(__file__).parent / "data"
FORMATS = {"mooncake": Mooncake(), "azure": Azure(), "burstgpt": BurstGPT()}


def trace(name, **changes):
    settings = {
        "path": str(DATA / name),
        "format": FORMATS.get(Path(name).stem.split("_")[0]),
        "speed": 1.0,
        "begin": 0.0,
        "seconds": None,
        "max_tokens": None,
        "on_bad_line": "error",
        "vocab_size": 4096,
        "first_token": 4,
        "temperature": 0.0,
        "top_p": 1.0,
        "top_k": 0,
        "seed": 5,
    }
    return Trace(**{**settings, **changes})


def drawn(workload, arrival=None, seed=0, requests=None, seconds=None):
    return schedule.draw(workload, arrival or Recorded(), seed, requests, seconds)


def lengths(found):
    return [(len(r.prompt), r.output_tokens) for r in found.requests]


@pytest.mark.parametrize(
    ("name", "due_ms", "shapes"),
    [
        ("mooncake.jsonl", [0, 0, 500, 3000, 6000], [(1100, 12), (1500, 7), (900, 1), (905, 31), (40, 5)]),
        ("azure_2023.csv", [0, 4314.579, 4541.877, 4541.877], [(374, 44), (396, 109), (879, 55), (91, 16)]),
        ("azure_2024.csv", [0, 990.07, 2490.07], [(216, 5), (110, 8), (92, 1)]),
        ("burstgpt_sessions.csv", [0, 51_500], [(906, 446), (36, 29)]),
    ],
)
def test_times_and_lengths_are_those_of_the_file(name, due_ms, shapes):
    found = drawn(trace(name))
    assert lengths(found) == shapes
    assert list(found.due) == [round(ms * 1e6) for ms in due_ms]
    assert [r.id for r in found.requests] == list(range(len(shapes)))
    assert [r.sampling.seed for r in found.requests] == [5 + i for i in range(len(shapes))]
    assert all(4 <= t < 4096 for r in found.requests for t in r.prompt)


def test_blocks_with_one_id_have_the_same_tokens():
    a, b, c, d, e = (r.prompt for r in drawn(trace("mooncake.jsonl")).requests)
    assert common_prefix(a, b) == 2 * 512  # blocks 0 and 1; 2 and 3 differ from their first token on
    assert common_prefix(a, c) == common_prefix(b, d) == 512
    assert c == d[:900]  # block 4, cut at 900 - 512 = 388 and at 393
    assert common_prefix(a, e) == 0


def test_what_a_trace_repeats_is_counted():
    # of 1100 + 1500 + 900 + 905 + 40: the second repeats two blocks, the third one, the fourth all of the third
    assert drawn(trace("mooncake.jsonl")).repeated_tokens == 1024 + 512 + 900
    assert drawn(trace("azure_2023.csv")).repeated_tokens == 0


def test_another_seed_other_tokens_the_same_sharing():
    first, again, other = (drawn(trace("mooncake.jsonl"), seed=seed) for seed in (1, 1, 2))
    assert first.hash == again.hash
    assert first.requests[0].prompt != other.requests[0].prompt
    assert (lengths(first), first.due) == (lengths(other), other.due)
    assert first.repeated_tokens == other.repeated_tokens


def test_speed_divides_the_times():
    assert drawn(trace("mooncake.jsonl", speed=2.0)).due == (0, 0, 250_000_000, 1_500_000_000, 3_000_000_000)


def test_a_window_and_a_longest():
    part = drawn(trace("mooncake.jsonl", begin=0.5, seconds=5.0))
    assert part.due == (0, 2_500_000_000)  # 27.5 s and 30 s; 33 s is too late
    assert lengths(part) == [(900, 1), (905, 31)]
    assert lengths(drawn(trace("mooncake.jsonl", max_tokens=936))) == [(900, 1), (905, 31), (40, 5)]
    assert lengths(drawn(trace("mooncake.jsonl", max_tokens=935))) == [(900, 1), (40, 5)]
    with pytest.raises(UsageError, match="no request in it"):
        drawn(trace("mooncake.jsonl", begin=7.0))


def test_stops_cut_it():
    assert len(drawn(trace("mooncake.jsonl"), requests=3).due) == 3
    assert len(drawn(trace("mooncake.jsonl"), seconds=0.5).due) == 2


def test_another_arrival_times_it_anew():
    found = drawn(trace("mooncake.jsonl"), Constant(rate=10.0))
    assert found.due == (0, 100_000_000, 200_000_000, 300_000_000, 400_000_000)
    assert lengths(found) == lengths(drawn(trace("mooncake.jsonl")))
    assert drawn(trace("mooncake.jsonl"), Immediate()).is_immediate


def test_lines_without_hashes_are_unique_from_the_first_tokens_on(tmp_path):
    path = tmp_path / "azure.csv"
    rows = [f"2023-11-16 18:15:46.{i:06},3,1" for i in range(5000)]
    path.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows]))
    prompts = {r.prompt for r in drawn(trace("azure", path=str(path), format=Azure())).requests}
    assert len(prompts) == 5000


GOOD = '{"timestamp": 1, "input_length": 9, "output_length": 2, "hash_ids": [1]}'
BAD_JSON = [
    ("{", "not JSON"),
    ("[1]", "not a JSON object"),
    (GOOD.replace("timestamp", "time"), "timestamp is missing"),
    (GOOD.replace("1,", "-1,", 1), "timestamp=-1 is no time"),
    (GOOD.replace("1,", "true,", 1), "timestamp=True is no time"),
    (GOOD.replace("9", "0"), "input_length=0 is not above 0"),
    (GOOD.replace("2", "-2"), "output_length=-2 is not above 0"),
    (GOOD.replace("2", "2.5"), r"output_length=2\.5 is no whole number"),
    (GOOD.replace("9", "513"), "1 hash_ids, but 513 tokens are 2 blocks of 512"),
    (GOOD.replace("[1]", "[-1]"), "hash_ids is no list of whole numbers"),
    (GOOD.replace("1,", "0,", 1), "its time lies before that of the line before"),
]


@pytest.mark.parametrize(("line", "words"), BAD_JSON, ids=[words for _, words in BAD_JSON])
def test_a_bad_line_is_named_or_left_out_and_told(line, words, tmp_path, capsys):
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join([GOOD, "", line, GOOD, line]))
    settings = {"path": str(path), "format": Mooncake()}
    with pytest.raises(UsageError, match=rf"trace\.jsonl: line 3: {words}.*workload\.on_bad_line=skip") as refused:
        drawn(trace("mooncake", **settings))
    assert "\n" not in str(refused.value)
    for _ in range(2):  # a schedule is drawn more than once, but the fault told once
        assert len(drawn(trace("mooncake", **settings, on_bad_line="skip")).due) == 2
    (told,) = capsys.readouterr().err.splitlines()
    assert "2 of 5 lines left out, the first line 3: " in told


BAD_CSV = [
    ("azure_2023.csv", "yesterday,1,1", "TIMESTAMP='yesterday' is no date and time"),
    ("azure_2023.csv", "2023-11-16 18:16:00,1", "2 fields under 3 headings"),
    ("azure_2023.csv", "2023-11-16 18:16:00,1.5,1", r"ContextTokens='1\.5' is no whole number"),
    ("azure_2023.csv", "2023-11-16 18:15:00,1,1", "its time lies before"),
    ("burstgpt_sessions.csv", "nan,,,GPT-4,1,1,2,API log", "Timestamp='nan' is no time"),
    ("burstgpt_sessions.csv", "19440162,,,GPT-4,,1,1,API log", "Request tokens='' is no whole number"),
]


@pytest.mark.parametrize(("name", "line", "words"), BAD_CSV, ids=[words for *_, words in BAD_CSV])
def test_bad_lines_of_tables(name, line, words, tmp_path):
    text = (DATA / name).read_text()
    (tmp_path / name).write_text(text + line + "\n")
    with pytest.raises(UsageError, match=rf"line {len(text.splitlines()) + 1}: {words}"):
        drawn(trace(name, path=str(tmp_path / name)))


def test_failed_requests_of_burstgpt_have_no_answer(capsys):
    with pytest.raises(UsageError, match=r"burstgpt\.csv: line 4: Response tokens=0 is not above 0"):
        drawn(trace("burstgpt.csv"))
    assert drawn(trace("burstgpt.csv", on_bad_line="skip")).due == (0, 40_000_000_000, 113_000_000_000)
    assert "1 of 5 lines left out" in capsys.readouterr().err


def test_another_format_or_no_file_is_told(tmp_path):
    with pytest.raises(UsageError, match="line 1: the heading lacks TIMESTAMP, ContextTokens, GeneratedTokens"):
        drawn(trace("burstgpt.csv", format=Azure()))
    (tmp_path / "empty").write_text("")
    with pytest.raises(UsageError, match="line 1: the heading lacks"):
        drawn(trace("x", path=str(tmp_path / "empty"), format=Azure()))
    with pytest.raises(UsageError, match=r"workload\.path=/nowhere: No such file"):
        drawn(trace("x", path="/nowhere", format=Azure()))
    with pytest.raises(UsageError, match=r"workload\.path=.*: Is a directory"):
        drawn(trace("x", path=str(tmp_path), format=Azure()))


@pytest.mark.parametrize(
    "change",
    [{"speed": 0}, {"begin": -1}, {"seconds": 0}, {"max_tokens": 1}, {"on_bad_line": "mend"}, {"top_p": 0}],
    ids=str,
)
def test_bad_settings_are_named(change):
    ((name, value),) = change.items()
    with pytest.raises(UsageError, match=rf"workload\.{name}={value!r}: must be"):
        trace("mooncake.jsonl", **change)


def test_only_what_is_asked_is_read(tmp_path):
    """A trace may be far larger than the memory."""
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join([GOOD] * 3 + ["{"]))
    workload = trace("mooncake", path=str(path), format=Mooncake())
    assert len(list(islice(workload.requests(np.random.default_rng(0)), 3))) == 3


def test_times_that_nobody_recorded_are_refused():
    from test_workloads import synthetic

    with pytest.raises(UsageError, match="arrival=recorded: this workload has no times of its own"):
        drawn(synthetic(), requests=3)
