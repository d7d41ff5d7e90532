"""The tokenizer of a seeded checkpoint: token i is a word, and what a conversation costs is known."""

from pathlib import Path

import pytest
import transformers
from engine_kit import published
from test_checkpoint import SMALL, make
from tokenizers import Tokenizer

from stackrace.backends import checkpoint


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("small") / "model").path


CHAT = [
    {"role": "system", "content": "t9 t10"},
    {"role": "user", "content": "t11"},
    {"role": "assistant", "content": ""},
    {"role": "tool", "content": "t12 t13 t14"},
]


def test_a_message_costs_its_words_and_two_tokens(small: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(small)
    expected = [1, 4, 9, 10, 2, 5, 11, 2, 6, 2, 7, 12, 13, 14, 2]
    assert tokenizer.apply_chat_template(CHAT, return_dict=False) == expected
    assert tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False) == [*expected, 6]


@pytest.mark.parametrize(("bos", "eos", "unknown"), [(0, 1, 2), (8, 8, 0), (299, [298, 297], 0)])
def test_any_special_tokens_make_a_tokenizer(bos: int, eos: int | list[int], unknown: int, tmp_path: Path) -> None:
    config = published("tiny") | SMALL | {"bos_token_id": bos, "eos_token_id": eos}
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        checkpoint.make(config, tmp_path / "model", 0, 1 << 40, "cpu").path
    )
    assert len(tokenizer) == 300
    assert tokenizer.apply_chat_template(CHAT[1:2], return_dict=False) == [
        bos,
        5,
        11,
        *(eos[:1] if isinstance(eos, list) else [eos]),
    ]
    assert tokenizer("what t3").input_ids == [unknown, 3]


def test_token_words(small: Path) -> None:
    tokenizer = Tokenizer.from_file(str(small / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 300
    ids = list(range(3, 300))
    assert tokenizer.encode(" ".join(f"t{i}" for i in ids)).ids == ids
    assert tokenizer.encode("</s> t11 what").ids == [2, 11, 0]
