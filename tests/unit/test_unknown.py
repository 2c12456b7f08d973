"""text/unknown.py: characters that the tokenizer lacks are counted in the ledger; ids with gaps."""

import json

import pytest
from data_helpers import tiny
from helpers import TINY, chat, chatml, make_directory, write
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

import data
from settings.errors import UserError
from text import unknown
from text.template import ChatTokenizer

LETTERS = {char: i for i, char in enumerate("abcdefghijklmnopqrstuvwxyz \n")}
BYTES = {f"<0x{byte:02X}>": 100 + byte for byte in range(256)}
BYTE_LEVEL = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
TEXT = "a龘b e\u0301 龘!\t<unk> "  # 龘, 龘, !, a tab, and the accent where it is not composed


def byte_level(vocabulary, **options):
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[], **options))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return raw


def with_step(raw, name, step):
    setattr(raw, name, step)
    return raw


CASES = {  # a tokenizer, and what it lacks in TEXT
    "bytes": (byte_level(BYTE_LEVEL), "NONE", (0, 0)),
    "fallback": (Tokenizer(models.BPE(vocab={**LETTERS, **BYTES}, merges=[], byte_fallback=True)), "NONE", (0, 0)),
    "fallback, half of it": (
        Tokenizer(models.BPE(vocab=LETTERS | {"<unk>": 40, "<0xE9>": 41}, merges=[], byte_fallback=True,
                             unk_token="<unk>")), 40, (5, 0)),
    "no fallback": (Tokenizer(models.BPE(vocab=LETTERS, merges=[])), "LOST", (0, 7)),
    "composed": (with_step(Tokenizer(models.BPE(vocab={**LETTERS, "é": 40}, merges=[])), "normalizer", normalizers.NFC()),
                 "LOST", (0, 6)),
    "spaces removed": (with_step(Tokenizer(models.BPE(vocab=LETTERS, merges=[])), "pre_tokenizer",
                                 pre_tokenizers.WhitespaceSplit()), "LOST", (0, 6)),
    "some bytes": (byte_level({char: i for char, i in BYTE_LEVEL.items() if char != "!"}), "LOST", (0, 1)),
    "unigram": (Tokenizer(models.Unigram([("<unk>", -9.0), *((char, -1.0) for char in LETTERS)], unk_id=0)), 0, (3, 0)),
}


@pytest.mark.parametrize("name", CASES)
def test_what_a_tokenizer_lacks(name, tmp_path):
    """Tokens that are the unknown one, or characters without a token; a quoted <unk> does not count."""
    raw, kind, expected = CASES[name]
    raw.add_special_tokens(["<|im_end|>", "<unk>"] if raw.token_to_id("<unk>") is not None else ["<|im_end|>"])
    tokenizer = ChatTokenizer(make_directory(tmp_path / "model", None, raw=raw, eos_token="<|im_end|>"))
    assert tokenizer.unknown_id == getattr(unknown, str(kind), kind)
    found = unknown.count_unknown(TEXT, raw.encode(TEXT, add_special_tokens=False).ids, tokenizer)
    assert found[:2] == expected
    assert set(found.examples) <= set(TEXT) - {"a", " "} and bool(found.examples) == any(expected)


def test_the_ledger_counts_them(tmp_path):
    """The line is there only if something is lost."""
    raw = Tokenizer(models.BPE(vocab=LETTERS, merges=[]))
    raw.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer = ChatTokenizer(make_directory(tmp_path / "model", chatml("m.content"), raw=raw, eos_token="<|im_end|>"))
    path = write(tmp_path / "rows.json", [{"messages": chat("q", text)} for text in ("fine", "龘\u202e", "a龘", "b")])
    assert data.load(path, tokenizer, 99).ledger.lines()[2] == (
        r"unknown  the tokenizer lacks characters: \u202e 龘; 3 characters have no token and vanish, in 2 rows")
    assert not any(line.startswith("unknown") for line in data.load(path, tiny, 99).ledger.lines())


def test_an_id_above_the_vocabulary_is_refused(tmp_path):
    """Where ids have gaps, the highest one counts, not how many there are; --resize_embeddings makes rows up to it."""
    with open(f"{TINY}/tokenizer.json", encoding="utf-8") as f:
        parsed = json.load(f)
    vocabulary = parsed["model"]["vocab"]
    token = next(token for token, i in vocabulary.items() if i == 1000)
    directory = tmp_path / "model"
    make_directory(directory, chatml("m.content"))
    vocabulary[token] = 5000
    (directory / "tokenizer.json").write_text(json.dumps(parsed))
    with pytest.raises(UserError, match=r"ids up to 5000, the model's embedding has 2048 rows.* --resize_embeddings"):
        ChatTokenizer(str(directory), 2048)
    assert ChatTokenizer(str(directory), 5001).size == 5001
