"""Text and token ids: whatever comes in pieces is, put together, what the tokenizer says of the whole."""

import json
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from stackrace.backends.mla.server.tokenizer import Detokenizer, StopFinder
from stackrace.harness.tokenizer import TextTokenizer

WORDS = ["a", "b", " ", "ab", "é", "日", "日本", "🙂", "\n", "the", " the", ".", "…"]
SPECIAL = ["<s>", "</s>", "<unk>"]


def byte_level() -> Tokenizer:
    """As Llama 3's and Qwen's: every byte is a token, some words are, and a token may be part of a character."""
    spell = pre_tokenizers.ByteLevel(add_prefix_space=False)
    vocab = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    for word in WORDS:
        for symbols, _ in spell.pre_tokenize_str(word):
            vocab.setdefault(symbols, len(vocab))
    found = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    found.pre_tokenizer, found.decoder = spell, decoders.ByteLevel()
    found.add_special_tokens(SPECIAL)
    return found


def byte_fallback() -> Tokenizer:
    """As Llama 2's: words with a mark for the space before them, bytes as words of their own."""
    words = [
        "▁",
        *(word.replace(" ", "▁") for word in WORDS),
        "▁a",
        "▁the",
        *(f"<0x{byte:02X}>" for byte in range(256)),
    ]
    vocab = {word: index for index, word in enumerate(dict.fromkeys(words))}
    found = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    found.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    found.add_special_tokens(SPECIAL)
    return found


def words() -> Tokenizer:
    """As our own checkpoints': token i is a word."""
    found = Tokenizer(models.WordLevel({f"t{index}": index for index in range(40)} | {"<unk>": 40}, unk_token="<unk>"))
    found.add_special_tokens(SPECIAL)
    return found


KINDS = {"bytes": byte_level, "fallback": byte_fallback, "words": words}


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    folder = tmp_path_factory.mktemp(request.param)
    KINDS[request.param]().save(str(folder / "tokenizer.json"))
    return TextTokenizer(folder)


def pieces(tokenizer: TextTokenizer, prompt: list[int], output: list[int], skip: bool) -> list[str]:
    detokenizer = Detokenizer(tokenizer, prompt, skip)
    return [*(detokenizer.add(token) for token in output), detokenizer.flush()]


def beyond(before: str, text: str) -> str:
    """What `text` has beyond the beginning it shares with `before`."""
    shared = 0
    while shared < min(len(before), len(text)) and before[shared] == text[shared]:
        shared += 1
    return text[shared:]


@cache
def tokens(tokenizer: TextTokenizer, least: int) -> st.SearchStrategy[list[int]]:
    """Any tokens; but byte tokens as whole characters, or a broken run takes back what it was decoded to before."""
    vocab = tokenizer._tokenizer.get_vocab()
    if "<0x00>" in vocab:
        units = [[token] for word, token in vocab.items() if not word.startswith("<0x")]
        units += [[vocab[f"<0x{byte:02X}>"] for byte in char.encode()] for char in "aßह🙂"]
        return st.lists(st.sampled_from(units), min_size=least, max_size=20).map(lambda drawn: list(chain(*drawn)))
    return st.lists(st.integers(0, len(vocab) - 1), min_size=least, max_size=25)


@settings(max_examples=400, deadline=None)
@given(data=st.data(), skip=st.booleans())
def test_pieces_make_the_whole(tokenizer: TextTokenizer, data: st.DataObject, skip: bool) -> None:
    prompt, output = data.draw(tokens(tokenizer, 1)), data.draw(tokens(tokenizer, 0))
    said = pieces(tokenizer, prompt, output, skip)
    expected = beyond(tokenizer.decode(prompt, skip), tokenizer.decode(prompt + output, skip))
    assert "".join(said) == expected
    assert not any(piece.endswith("\N{REPLACEMENT CHARACTER}") for piece in said[:-1])


@settings(max_examples=100, deadline=None)
@given(text=st.text(alphabet="ab é日🙂\n….the ", min_size=1, max_size=30))
def test_text_comes_back_character_by_character(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    folder = tmp_path_factory.mktemp("bytes")
    byte_level().save(str(folder / "tokenizer.json"))
    tokenizer = TextTokenizer(folder)
    said = pieces(tokenizer, tokenizer.encode("x", special=False), tokenizer.encode(text, special=False), skip=True)
    assert "".join(said) == text
    assert said[-1] == ""
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in said)


def test_spaces_before_the_first_word_are_kept_and_special_tokens_are_silent(tmp_path: Path) -> None:
    byte_fallback().save(str(tmp_path / "tokenizer.json"))
    tokenizer = TextTokenizer(tmp_path)
    ids = tokenizer._tokenizer.token_to_id
    the, end = ids("▁the"), ids("</s>")
    assert pieces(tokenizer, [the], [the, end, the], skip=True) == [" the", "", " the", ""]
    assert pieces(tokenizer, [the], [the, end], skip=False) == [" the", "</s>", ""]
    assert tokenizer.token_text(end) == "</s>"
    unfinished = [ids(f"<0x{byte:02X}>") for byte in "🙂".encode()[:3]]
    assert pieces(tokenizer, [the], [the, *unfinished], skip=True) == [
        " the",
        "",
        "",
        "",
        3 * "\N{REPLACEMENT CHARACTER}",
    ]


@settings(max_examples=300, deadline=None)
@given(
    parts=st.lists(st.text(alphabet="abc", max_size=4), max_size=12),
    stops=st.lists(st.text(alphabet="abc", min_size=1, max_size=4), max_size=3),
)
def test_a_stop_string_ends_the_text_however_it_is_cut(parts: list[str], stops: list[str]) -> None:
    finder = StopFinder(stops)
    said = ""
    for end in range(1, len(parts) + 1):
        said += finder.add(parts[end - 1])
        text = "".join(parts[:end])
        at = min((text.index(stop) for stop in stops if stop in text), default=None)
        if at is not None:
            assert said == text[:at]
            assert finder.found is not None
            assert text[at:].startswith(finder.found)
            return
        held = text.removeprefix(said)
        assert text.startswith(said)
        assert not held or any(stop.startswith(held) for stop in stops)  # nothing is held back without a reason
    assert finder.found is None
    assert said + finder.flush() == "".join(parts)


TEMPLATES: dict[str, str] = {
    "loops": "{% for m in messages %}{{ bos_token }}[{{ m['role'] }}] {{ m.content | trim }}{{ eos_token }}\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}",
    "breaks": "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.content | tojson }}"
    "{% endfor %}",
    "refuses": "{% if messages[0].role != 'user' %}{{ raise_exception('a user first') }}{% endif %}x",
    "variables": "{{ 'think' if thinking else 'answer' }}{% set ns = namespace(n=0) %}{% for m in messages %}"
    "{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "spaces": "  {% if true %}\n    {% for m in messages %}\n  {{- m.content }}\n    {% endfor %}\n  {% endif %}",
}
TALK: list[dict[str, Any]] = [{"role": "user", "content": ' é <b> "x" '}, {"role": "assistant", "content": "y"}]


def with_template(folder: Path, template: object, in_file: bool) -> Path:
    words().save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>"}
    config |= {"eos_token": {"content": "</s>", "__type": "AddedToken"}}
    if in_file:
        (folder / "chat_template.jinja").write_text(str(template))
    else:
        config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("in_file", [True, False])
@pytest.mark.parametrize("name", [name for name in TEMPLATES if name != "refuses"])
def test_templates_are_rendered_as_transformers_renders_them(name: str, in_file: bool, tmp_path: Path) -> None:
    folder = with_template(tmp_path, TEMPLATES[name], in_file)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for variables in ({"add_generation_prompt": True}, {"add_generation_prompt": False, "thinking": True}):
        expected = theirs.apply_chat_template(TALK, tokenize=False, **variables)
        assert TextTokenizer(folder).render(TALK, variables) == expected


def test_one_of_several_templates(tmp_path: Path) -> None:
    templates = [{"name": "tool", "template": "no"}, {"name": "default", "template": "yes"}]
    assert TextTokenizer(with_template(tmp_path, templates, in_file=False)).render(TALK, {}) == "yes"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (TEMPLATES["refuses"], "refuses these messages: a user first"),
        ("{{ messages[9].content.nothing }}", "refuses these messages"),
        ("{{ ''.__class__.__mro__ }}", "refuses these messages"),  # the sandbox
        ("", "no chat template"),
    ],
)
def test_what_cannot_be_rendered_is_told(template: str, expected: str, tmp_path: Path) -> None:
    tokenizer = TextTokenizer(with_template(tmp_path, template, in_file=True))
    with pytest.raises(ValueError, match=expected):
        tokenizer.render(list(reversed(TALK)), {})


def test_a_tokenizer_that_would_cut_or_pad_does_not(tmp_path: Path) -> None:
    tokenizer = words()
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=10)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    text = " ".join(f"t{index}" for index in range(8))
    assert TextTokenizer(tmp_path).encode(text, special=True) == list(range(8))
