"""What a report says in words: who is ahead, where, by how much, and when nobody may claim to be."""

import re
from dataclasses import replace

from stackrace.harness.report.statements import frontier_sentence, headline, leader, sentence


def test_the_lead_is_told_with_its_ratio_and_place(write, points):
    write("mla", ttft=20, context=1024, rate=4.0)
    write("mla_mha", ttft=32, context=1024, rate=4.0)
    assert sentence(points(), "ttft", "p50") == (
        "mla's TTFT p50 is 1.60x lower than mla_mha's at 4 req/s and 1,024 input tokens in this run: "
        "20.0 against 32.0 ms. mla is ahead at the one shared point."
    )
    assert headline(points()) == (
        "In this run mla has the lowest TTFT p50 at the one shared point. "
        "No clear lead in TPOT p50 and output throughput."
    )


def test_nobody_leads_where_repeats_overlap_or_are_close(write, points):
    for repeat, (one, other) in enumerate([(20, 40), (50, 60)]):
        write("a", ttft=one, repeat=repeat)
        write("b", ttft=other, repeat=repeat)
    assert sentence(points(), "ttft", "p50").startswith("No clear lead in TTFT p50. Too close to call at the one")
    assert leader({"a": [100.0], "b": [104.0]}, "lower") is None
    assert leader({"a": [100.0], "b": [106.0]}, "lower") == "a"
    assert leader({"a": [100.0], "b": [106.0], "c": [107.0]}, "higher") is None


def test_nothing_is_claimed_from_points_that_are_not_valid(write, points):
    write("a", ttft=20, verdict="suspect")
    write("b", ttft=90)
    assert headline(points()) == "Only b has valid points: nothing to compare it with."
    assert sentence(points(), "ttft", "p50") == (
        "b's TTFT p50 is 90.0 ms at 10 req/s and 128 input tokens. No other stack has valid points to compare it with."
    )


def test_a_lead_at_few_points_is_no_lead(write, points):
    for rate in (1.0, 2.0, 4.0):
        write("a", rate=rate, ttft=20)
        write("b", rate=rate, ttft=40 if rate == 1.0 else 20)
    assert sentence(points(), "ttft", "p50") == (
        "No clear lead in TTFT p50. Of 3 shared points, ahead: a at 1; 2 too close to call."
    )


def test_throughput_against_interactivity_needs_no_loss_on_either(write, points):
    write("a", tpot=4)
    write("b", tpot=8)
    told = frontier_sentence(points())
    assert re.match(r"At 10 req/s and 128 input tokens in this run: a 102 tok/s at 250 tok/s/user; b \d+ tok/s", told)
    assert told.endswith("a is ahead at the one shared point.")


def test_a_rate_that_is_known_to_be_sustained_goes_first_as_an_example(write, points):
    """a leads at 5, 20 and 40 requests a second; at 10 they are alike."""
    for rate in (5.0, 10.0, 20.0, 40.0):
        write("a", ttft=20, rate=rate)
        write("b", ttft=20 if rate == 10 else 60, rate=rate)
    found = points()

    def example(*sustained):
        told = [replace(p, sustainable=p.condition.load.value in sustained or None) for p in found]
        return sentence(told, "ttft", "p50")

    assert "at 40 req/s" in example()
    assert "at 20 req/s" in example(5, 10, 20)
    assert "at 5 req/s" in example(10)
    assert example(10).endswith("Of 4 shared points, ahead: a at 3; 1 too close to call.")
    ones = [replace(p, sustainable=p.stack == "a" or None) for p in found]
    assert "at 40 req/s" in sentence(ones, "ttft", "p50")
