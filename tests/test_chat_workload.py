"""Chats of an asked length: rendered and tokenized they have exactly so many tokens, for a server too."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import transformers
from server_kit import complete, running, small
from test_sessions import sessions
from test_tokenizer import byte_level
from test_traces import trace
from test_workloads import synthetic
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from stackrace.harness import schedule
from stackrace.harness.errors import UsageError
from stackrace.harness.load.request import request_bytes
from stackrace.harness.types import Endpoint
from stackrace.workloads.arrivals import Immediate, Recorded
from stackrace.workloads.chat import Chat
from stackrace.workloads.lengths import Fixed, Uniform

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def trained(folder: Path, template: str = CHATML) -> Path:
    """A byte-level BPE as Qwen's and Llama 3's, with merges learned from our own pages, and ChatML."""
    found = Tokenizer(models.BPE())
    found.pre_tokenizer, found.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1500,
        special_tokens=["<|im_start|>", "<|im_end|>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    found.train([str(p) for p in sorted((Path(__file__).parents[1] / "docs").glob("m*.md"))], trainer)
    folder.mkdir(exist_ok=True)
    found.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return small(tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="module")
def port(checkpoint):
    with running(checkpoint) as (_, port):
        yield port


@pytest.fixture(scope="module", params=["words", "bytes"])
def folder(request, checkpoint, tmp_path_factory):
    return checkpoint if request.param == "words" else trained(tmp_path_factory.mktemp("bpe") / "model")


def chat(folder, asked=None, vocab_size=4096):
    lengths = Uniform(low=30, high=300)
    asked = asked or synthetic(input_lengths=lengths, vocab_size=4096)
    return Chat(asked=asked, tokenizer=str(folder), vocab_size=vocab_size)


def drawn(workload, requests=60, arrival=None, seed=0):
    return schedule.draw(workload, arrival or Immediate(), seed, requests, None)


def rendered(folder, request):
    """The ids as transformers has them, which is how servers get them."""
    messages = [{"role": role, "content": content} for role, content in request.messages]
    return transformers.AutoTokenizer.from_pretrained(folder).apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )


def test_every_chat_has_exactly_as_many_tokens_as_asked(folder):
    workload = chat(folder)
    found, plain = drawn(workload), drawn(workload.asked)
    assert [len(r.prompt) for r in found.requests] == [len(r.prompt) for r in plain.requests]
    for ours, theirs in zip(found.requests, plain.requests, strict=True):
        assert replace(ours, prompt=theirs.prompt, messages=None) == theirs
        assert [role for role, _ in ours.messages] == ["user"]
    for r in found.requests[:10]:
        assert list(r.prompt) == rendered(folder, r)
    assert len({r.messages for r in found.requests}) == 60


def test_chats_are_unique_frozen_and_seeded(folder, tmp_path):
    tight = synthetic(input_lengths=Fixed(tokens=30), vocab_size=4096)
    found = drawn(chat(folder, tight), requests=500)
    assert len({r.messages for r in found.requests}) == len({r.prompt for r in found.requests}) == 500
    found.save(tmp_path / "schedule.parquet")
    assert schedule.Schedule.load(tmp_path / "schedule.parquet") == found
    again, other = (drawn(chat(folder, tight), requests=500, seed=seed) for seed in (0, 1))
    assert again.hash == found.hash
    assert not {r.messages for r in other.requests} & {r.messages for r in found.requests}


def test_sessions_as_chats_keep_their_history(folder):
    asked = sessions(system_tokens=0, input_lengths=Fixed(tokens=40), output_lengths=Fixed(tokens=9), vocab_size=4096)
    found = drawn(chat(folder, asked), requests=12)
    assert [len(r.prompt) for r in found.requests] == [40, 89, 138] * 4
    assert [(r.session, r.turn, r.think) for r in found.requests[:3]] == [(0, 0, 0.0), (0, 1, 1.5), (0, 2, 1.5)]
    for a, b in pairwise(found.requests):
        if a.session == b.session:
            assert b.messages[: len(a.messages)] == a.messages
            (role, words), (last, _) = b.messages[len(a.messages) :]
            assert (role, len(words.split()), last) == ("assistant", 9, "user")
    assert list(found.requests[2].prompt) == rendered(folder, found.requests[2])


def test_a_trace_as_chats_keeps_times_and_ends(folder):
    workload = chat(folder, trace("azure_2024.csv"))
    assert workload.is_finite
    assert not chat(folder).is_finite
    found = drawn(workload, requests=None, arrival=Recorded())
    assert found.due == (0, 990_070_000, 2_490_070_000)
    assert [len(r.prompt) for r in found.requests] == [216, 110, 92]


def test_too_short_a_chat_is_refused_with_what_it_needs(checkpoint):
    # bos, role, eos and the answer's role are 4 tokens; below 2^20, three of 509 words spell every number
    def asking(tokens):
        return chat(checkpoint, synthetic(input_lengths=Fixed(tokens=tokens), vocab_size=4096))

    for tokens in (3, 6):
        words = rf"asks a chat of {tokens} tokens, but the template .*need 7: lengthen lengths\.input"
        with pytest.raises(UsageError, match=words):
            drawn(asking(tokens))
    assert {len(r.prompt) for r in drawn(asking(7)).requests} == {7}
    short = sessions(system_tokens=4, input_lengths=Fixed(tokens=4), vocab_size=4096)  # 4 + 4, then 5 + 4 more
    with pytest.raises(UsageError, match="request 1 asks a chat of 17 tokens, but what was said before"):
        drawn(chat(checkpoint, short))


def test_what_has_no_chats_is_refused(checkpoint, tmp_path):
    with pytest.raises(UsageError, match=r"workload\.tokenizer=.*: no tokenizer\.json there: make the checkpoint"):
        drawn(chat(tmp_path / "nowhere"))
    with pytest.raises(UsageError, match=r"it makes token \d+, and the model's vocab_size is 400"):
        drawn(chat(trained(tmp_path / "bpe"), vocab_size=400))
    with pytest.raises(UsageError, match="this model has no chat template"):
        drawn(chat(trained(tmp_path / "mute", template="")))
    with pytest.raises(UsageError, match="refuses these messages: no"):
        drawn(chat(trained(tmp_path / "picky", template="{{ raise_exception('no') }}")))
    byte_level().save(str(tmp_path / "tokenizer.json"))  # without merges each letter is a token
    with pytest.raises(UsageError, match="it has no words of one token to write chats with"):
        drawn(chat(tmp_path))


def test_a_stack_without_weights_has_no_tokenizer(compose, tmp_path):
    from stackrace.harness.point import plan

    with pytest.raises(UsageError, match=r"workload\.tokenizer=.*tiny-seed0: no tokenizer\.json there"):
        plan(compose("backend=mock", "workload=chat", f"models={tmp_path}"))


def test_the_engine_counts_the_same_and_answers(checkpoint, port, load):
    found = drawn(chat(checkpoint, synthetic(input_lengths=Uniform(low=12, high=90)), vocab_size=512), requests=8)
    records, _ = load(Endpoint(f"http://127.0.0.1:{port}", "tiny"), found, concurrency=2)
    assert [r.error for r in records] == [None] * 8
    assert [r.prompt_tokens for r in records] == [len(r.prompt) for r in found.requests]
    assert {(r.output_tokens, sum(r.chunk_tokens), r.token_source) for r in records} == {(7, 7, "ids")}


def test_the_engine_reads_the_very_ids(checkpoint, port):
    asked = drawn(chat(checkpoint, synthetic(input_lengths=Fixed(tokens=25)), vocab_size=512), requests=1).requests[0]
    body = json.loads(request_bytes(Endpoint("http://h", "tiny"), asked).split(b"\r\n\r\n")[1])
    body = {k: v for k, v in body.items() if k not in ("stream", "stream_options")}
    answer = complete(port, body, "/v1/chat/completions")
    assert answer["prompt_token_ids"] == list(asked.prompt)
    assert answer["usage"]["prompt_tokens"] == 25


def test_the_mock_counts_the_words_of_a_chat_and_the_template_it_is_told(checkpoint, mock_engine, load):
    found = drawn(chat(checkpoint, vocab_size=512), requests=4)
    records, _ = load(mock_engine("backend.ttft=0", "backend.gap=0.001", "backend.template_tokens=4"), found)
    assert [(r.error, r.prompt_tokens, r.output_tokens) for r in records] == [
        (None, len(r.prompt), 7) for r in found.requests
    ]
