"""Do stacks compute the same: planted faults are found, rounding is none of them, the judge is transformers'."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from server_kit import running, small
from verify_kit import (
    CPU,
    SETTINGS,
    SHORT,
    World,
    answered,
    half_split,
    layers,
    lost_page,
    nothing,
    swapped_experts,
    verdict,
    without_mscale,
    world,
)

from stackrace.backends import checkpoint
from stackrace.backends.mla.engine import Engine
from stackrace.harness.errors import UsageError
from stackrace.harness.types import Endpoint
from stackrace.harness.verify import answers as asking
from stackrace.harness.verify import judge, reference
from stackrace.harness.verify.answers import Answers, NoAnswer
from stackrace.harness.verify.command import verify
from stackrace.harness.verify.naming import Names
from stackrace.harness.verify.questions import Questions, draw, prefix_lengths
from stackrace.harness.verify.reference import NoJudge, Peer, obtain, place
from stackrace.harness.verify.settings import parse
from stackrace.harness.verify.verdict import compare

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> World:
    return world(tmp_path_factory.mktemp("tiny"), {})


@pytest.fixture(scope="module")
def expert(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Experts as strong as DeepSeek-V2's, scaled by 16: those of `tiny` add less than bfloat16 rounds away."""
    return world(tmp_path_factory.mktemp("expert"), {"routed_scaling_factor": 16.0})


@pytest.mark.parametrize("how", [{}, {"attention": "mha"}, {"dtype": "float32"}], ids=str)
def test_rounding_and_another_cache_are_no_fault(tiny: World, how: dict[str, str]) -> None:
    found = verdict(tiny, nothing, **how)
    assert found.verdict == "equal", found.words
    assert found.mean is not None
    assert found.limits is not None
    assert found.mean < found.limits.usual / 2
    assert (found.mean < 1e-5) == (how.get("dtype") == "float32")


@pytest.mark.parametrize("plant", [without_mscale, half_split])
def test_a_wrong_attention_is_found(tiny: World, plant: Callable[[Engine], object]) -> None:
    found = verdict(tiny, plant)
    assert found.verdict == "differs"
    assert found.words.startswith("computes something else: mean |Δlogp| 0.0")


def test_a_page_lost_while_decoding_is_found(tiny: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """No prefix tells of it: what follows them is computed by prefill."""
    with lost_page(monkeypatch, "decode") as plant:
        found = verdict(tiny, plant)
    assert found.verdict == "differs"
    assert "while decoding" in found.words
    assert "prefixes" not in found.words


def test_a_page_lost_between_chunks_is_found_where_it_was(tiny: World, monkeypatch: pytest.MonkeyPatch) -> None:
    with lost_page(monkeypatch, "chunk") as plant:
        found = verdict(tiny, plant)
    assert found.verdict == "differs"
    assert found.worst is not None
    assert found.worst[0].tokens > 128
    assert f"after {found.worst[0].tokens} tokens" in found.words


def test_one_prefix_that_rounding_cannot_explain_is_found(tiny: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """As vLLM 0.26 computes it where the context of one prompt of a batch gets lost: one of many, and no length's."""
    with lost_page(monkeypatch, "chunk", "once") as plant:
        found = verdict(tiny, plant)
    assert found.worst is not None
    assert found.limits is not None
    assert found.worst[0].difference > found.limits.far > found.limits.worst / 2 > found.worst[1].difference
    assert found.words.endswith(
        f"mean |Δlogp| {found.worst[0].difference:#.2g} after {found.worst[0].tokens} tokens, "
        f"beyond what rounding does ({found.limits.far:.2g})"
    )


def test_swapped_experts_are_found(expert: World) -> None:
    assert verdict(expert, nothing).verdict == "equal"
    assert verdict(expert, swapped_experts).verdict == "differs"


@pytest.mark.parametrize(
    ("lengths", "off", "expected"),
    [
        # of other lengths: what rounding may do
        ([*range(11, 51), *range(11, 31)], [3, 23, 24], "equal: mean |Δlogp| 0.02 over 60 prefixes, 3 far off (0.40 "),
        ([*range(11, 51), *range(11, 31)], [3, 43], "computes something else: every prefix of a length far off (0.40 "),
        ([*range(11, 51), *range(11, 31)], [9, 49], "equal"),  # 20 tokens: a length that came up twice by chance
        ([*range(11, 51), *range(11, 31)], [3, 23, 24, 25], "computes something else: 4 of 60 prefixes far off"),
        ([*range(11, 41), 14, 14], [3], "equal"),
        ([*range(11, 41), 14, 14], [3, 30], "computes something else: 2 of 32 prefixes far off"),
        ([*range(11, 71), 14, 14], [3, 60], "equal"),  # the third one is right
    ],
)
def test_a_length_that_is_always_wrong_is_found(lengths: list[int], off: list[int], expected: str) -> None:
    """14 is a length that is wanted; without a judge the limits are 0.3 and, beyond one, 5 % of the prefixes."""
    questions = Questions(tuple((7,) * n for n in lengths), ((7,),), 1, 1)
    right = [{7: -1.0} for _ in lengths]
    wrong = [{7: -1.4 if i in off else -1.0} for i in range(len(lengths))]
    once = [[7]], [[{7: -1.0}]]
    settings = parse(SHORT | {"mean_limit": 1.0, "exact": [14]})
    found = compare(Peer("right", Answers(right, *once)), Answers(wrong, *once), questions, settings)
    assert found.words.startswith(expected)


def test_lengths_that_are_wanted_are_asked_twice(tiny: World) -> None:
    lengths = [len(prefix) for prefix in tiny.questions.prefixes]
    assert lengths[:6] == [*SETTINGS.exact, *SETTINGS.exact]
    assert len(set(tiny.questions.prefixes[:6])) == 6
    assert prefix_lengths(SETTINGS._replace(prefixes=6), 650) == [64, 65, 600, 64, 65, 600]


def test_stacks_without_a_judge_are_held_to_each_other(tiny: World) -> None:
    first, second = answered(tiny, nothing), answered(tiny, other_weights)
    for answers, expected in ((first, "equal"), (second, "differs")):
        found = compare(Peer("first", first), answers, tiny.questions, SETTINGS)
        assert found.verdict == expected
        assert found.words.endswith(", against first")


def other_weights(engine: Engine) -> None:
    for layer in layers(engine):
        layer.attention.o_proj.weight[:] = layer.attention.o_proj.weight.flip(0)


def test_the_judge_is_transformers(tiny: World) -> None:
    path = tiny.weights.path
    theirs = transformers.DeepseekV2ForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    everything = range(tiny.weights.config["vocab_size"])
    with torch.inference_mode():
        for index in (0, 1, 9):
            logits = theirs(torch.tensor([tiny.questions.prefixes[index]])).logits[0, -1]
            off = torch.log_softmax(logits, -1).numpy() - tiny.judged.after(index, everything)
            assert abs(off).max() < 1e-4
        whole = torch.tensor([[*tiny.questions.prompts[1], *tiny.judged.output(1)]])
        following = torch.log_softmax(theirs(whole).logits[0, len(tiny.questions.prompts[1]) - 1 : -1], -1)
    assert following.argmax(-1).tolist() == tiny.judged.output(1)
    for step, row in enumerate(following):
        top = row.topk(5)
        assert abs(top.values.numpy() - tiny.judged.at_step(1, step, top.indices.tolist())).max() < 1e-4


def test_the_judge_answers_once_from_a_process_of_its_own(tmp_path: Path) -> None:
    few = parse(SHORT | {"prefixes": 2, "exact": [5], "longest": 16, "greedy": 1, "greedy_tokens": 3})
    here = world(tmp_path, {"vocab_size": 64}, few)
    path = place(tmp_path / "references", here.weights, here.questions)
    found = obtain(path, here.weights, here.questions, "cpu", (0,), 100)
    assert found.output(0) == here.judged.output(0)
    assert found.after(1, [7]) == pytest.approx(here.judged.after(1, [7]), abs=1e-5)
    written = path.stat().st_mtime_ns
    obtain(path, here.weights, here.questions, "cpu", (0,), 100)
    assert path.stat().st_mtime_ns == written
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_judge_that_cannot_says_so_in_a_line(tiny: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(reference.sys, "executable", shutil.which("false"))
    with pytest.raises(NoJudge, match="the judge cannot: exit code 1"):
        obtain(tmp_path / "x.npz", tiny.weights, tiny.questions, "cpu", (0,), 100)
    (tmp_path / "x.npz").write_bytes(b"")
    with pytest.raises(NoJudge, match=r"x\.npz cannot be read .*: delete it"):
        obtain(tmp_path / "x.npz", tiny.weights, tiny.questions, "cpu", (0,), 100)
    huge = dataclasses.replace(tiny.weights, num_parameters=10**15)
    with pytest.raises(UsageError, match=r"model takes 4400000\.0 GB in float32, cpu has .* GB free"):
        judge.Judge(huge, tiny.questions, CPU, torch.float32)
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match=r"verify\.device=cuda: torch sees no GPU here"):
            judge.Judge(tiny.weights, tiny.questions, torch.device("cuda"), torch.float32)


@pytest.mark.engine
def test_the_command_finds_a_server_that_forgot_its_mscale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Real HTTP; the server reads a config.json that lacks a key, the judge the right one."""
    right = small(tmp_path, initializer_range=0.1)
    wrong = tmp_path / "wrong"
    shutil.copytree(right, wrong)
    config = json.loads((wrong / "config.json").read_text())
    config["rope_scaling"] |= {"mscale": 0.0, "mscale_all_dim": 0.0, "attention_factor": 1.0}
    (wrong / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(reference, "_compute", in_this_process)
    common = ["verify=short", "verify.prefixes=12", "verify.exact=[65]", "verify.longest=100", f"results={tmp_path}"]
    common += ["verify.greedy=2", "verify.greedy_tokens=8", "backend.max_model_len=500"]
    with running(wrong) as (_, port):
        url = f"backend.url=http://127.0.0.1:{port}"
        common += ["backend=external", url, "backend.model=tiny"]
        assert verify([*common, f"backend.checkpoint={right}"]) == 1
        assert "computes something else: mean |Δlogp|" in capsys.readouterr().out.replace("\n", " ")
        held = json.loads((tmp_path / "verify" / "equivalence.json").read_text())["external"]
        assert held["verdict"] == "differs"
        assert held["mean"] > held["limits"]["usual"]
        assert verify([*common, f"backend.checkpoint={wrong}"]) == 0
    assert verify([*common, "backend.checkpoint=null", "backend.startup_timeout=1"]) == 1
    assert "no checkpoint is known" in capsys.readouterr().out.replace("\n", " ")


def in_this_process(
    path: Path, weights: checkpoint.Checkpoint, questions: Questions, device: str, *limits: object
) -> None:
    judge.save(path, judge.answers(weights, questions, torch.device(device)))


@pytest.mark.parametrize(
    ("overrides", "words"), [(["verify=none"], "verify=none"), (["backend=mla,mla"], "two of them have one name")]
)
def test_the_command_refuses_what_makes_no_sense(overrides: list[str], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        verify(overrides)


def test_questions_are_seeded_fit_and_hold_no_special_token() -> None:
    usable = list(range(3, 50))
    asked = draw(SETTINGS, usable, 100)
    assert asked == draw(SETTINGS, usable, 100)
    assert asked.hash != draw(SETTINGS._replace(seed=1), usable, 100).hash
    assert asked.longest == 100
    assert [len(p) for p in asked.prefixes[:5]] == [64, 65, 64, 65, 16]
    assert len(asked.prefixes) == SETTINGS.prefixes
    assert {t for p in (*asked.prefixes, *asked.prompts) for t in p} == set(usable)
    assert max(map(len, draw(SETTINGS, usable, None).prefixes)) == 600


def choice(**fields: Any) -> dict[str, Any]:
    return {
        "text": " t7 t8",
        "logprobs": {"tokens": ["t7", " t8"], "top_logprobs": [{"t7": -1.0, "t9": None}] * 2},
    } | fields


def test_answers_are_read_in_every_dialect(tiny: World) -> None:
    names = Names(tiny.weights.path)
    assert asking._told(choice(), names) == [{7: -1.0, 9: asking.IMPOSSIBLE}] * 2
    by_id = {"top_logprobs": [{"token_id:12": -2.5, "token_id:1": -3}]}
    assert asking._told(choice(logprobs=by_id), names) == [{12: -2.5, 1: -3.0}]
    assert asking._tokens(choice(token_ids=[4, 5]), names, 2) == [4, 5]
    assert asking._tokens(choice(), names, 2) == [7, 8]
    assert asking._tokens(choice(logprobs=None), names, 2) == [7, 8]
    with pytest.raises(NoAnswer, match="3 tokens were asked for, 2 can be told"):
        asking._tokens(choice(), names, 3)
    for silent in (None, {"top_logprobs": []}, {"top_logprobs": [None]}, {"top_logprobs": [{"nonesuch": -1.0}]}):
        with pytest.raises(NoAnswer, match="tells no log-probabilities"):
            asking._told(choice(logprobs=silent), names)


def test_a_stack_that_refuses_is_quoted_without_secrets(tiny: World) -> None:
    nobody = Endpoint("http://127.0.0.1:9", "m")
    with pytest.raises(NoAnswer, match="Cannot connect"):
        asking.ask(nobody, tiny.questions, SETTINGS, Names(tiny.weights.path))
    secret = Endpoint("http://x", "m", {"Authorization": "Bearer s3cret"}, {"extra": 1}, ("logprobs",))
    with pytest.raises(NoAnswer, match=r"HTTP 401: bad key \*\*\*"):
        asking._choice(401, b"bad key s3cret", secret)
    body = asking._body(secret, (1, 2), 1, 5)
    assert body["extra"] == 1
    assert "logprobs" not in body
    json.dumps(body)


@pytest.mark.parametrize(("key", "value"), [("prefixes", 0), ("logprobs", 21), ("device", "tpu"), ("mean_limit", "a")])
def test_settings_are_checked(key: str, value: object) -> None:
    with pytest.raises(UsageError, match=f"verify.{key}="):
        parse(SHORT | {key: value})


def test_settings_of_a_check_that_nobody_makes() -> None:
    with pytest.raises(UsageError, match=r"verify lacks seed, .*, timeout: with verify=none leave verify"):
        parse({"device": "cpu"})
