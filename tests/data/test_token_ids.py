"""Ids of prompts and responses against those of the whole text, for every family of tokenizers."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from align.data.encode import encode_example, encode_pair, encode_prompt
from align.data.rows import Demonstration, Preference, Prompt
from align.data.token_ids import decode_response
from align.data.tokenize import tokenize_demonstrations, tokenize_preferences, tokenize_prompts
from align.errors import BadRow, UserError
from tests.data.messages import assistant, user
from tests.data.test_tokenize import SHARED, STORIES

SPECIAL = ["<unk>", "<s>", "</s>"]
TEXTS = ["the cat sat on the mat", "what is two and two", "on the mat: the cat's\nanswer", "sat. the the cat"] * 8
# As of Llama 2: what follows a special token, and a response after a bracket.
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}"
    "{{ eos_token }}{% endif %}{% endfor %}"
)
ADDED = {"nothing": "$A", "BOS": "<s> $A", "EOS": "$A </s>", "both": "<s> $A </s>"}


def byte_level(tokenizer: Tokenizer, add_prefix_space: bool) -> trainers.Trainer:
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    return trainers.BpeTrainer(
        vocab_size=320, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )


def metaspace(tokenizer: Tokenizer, prepend_scheme: str, unigram: bool = False) -> trainers.Trainer:
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend_scheme)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=prepend_scheme)
    if unigram:
        return trainers.UnigramTrainer(vocab_size=60, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    return trainers.BpeTrainer(vocab_size=90, special_tokens=SPECIAL)


def legacy(tokenizer: Tokenizer) -> trainers.Trainer:
    """As Llama 2's: a space is put before the text and after special tokens, and no word is split off."""
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return trainers.BpeTrainer(vocab_size=120, special_tokens=SPECIAL)


def t5(tokenizer: Tokenizer) -> trainers.Trainer:
    """Unigram behind a normalizer that drops spaces at the ends and shortens others."""
    trainer = metaspace(tokenizer, "always", unigram=True)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")])
    return trainer


def wordpiece(tokenizer: Tokenizer) -> trainers.Trainer:
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    return trainers.WordPieceTrainer(vocab_size=90, special_tokens=SPECIAL)


FAMILIES: dict[str, tuple[Any, Any]] = {
    "byte-level": (models.BPE, functools.partial(byte_level, add_prefix_space=False)),
    "byte-level with a space first": (models.BPE, functools.partial(byte_level, add_prefix_space=True)),
    "SentencePiece BPE, prepend always": (models.BPE, functools.partial(metaspace, prepend_scheme="always")),
    "SentencePiece BPE, prepend first": (models.BPE, functools.partial(metaspace, prepend_scheme="first")),
    "SentencePiece BPE, prepend never": (models.BPE, functools.partial(metaspace, prepend_scheme="never")),
    "SentencePiece BPE, legacy": (models.BPE, legacy),
    "Unigram": (models.Unigram, functools.partial(metaspace, prepend_scheme="always", unigram=True)),
    "Unigram of T5": (models.Unigram, t5),
    "WordPiece": (models.WordPiece, wordpiece),
}


@functools.cache
def trained(family: str) -> str:
    model, prepare = FAMILIES[family]
    tokenizer = Tokenizer(model() if model is models.Unigram else model(unk_token="<unk>"))
    tokenizer.train_from_iterator(TEXTS, prepare(tokenizer))
    return tokenizer.to_str()


def make(family: str, added: str) -> Any:
    if family == "bytes, slow":
        return ByT5Tokenizer(bos_token="<s>", chat_template=TEMPLATE)  # adds EOS
    backend = Tokenizer.from_str(trained(family))
    ids = [(token, SPECIAL.index(token)) for token in SPECIAL]
    backend.post_processor = processors.TemplateProcessing(single=ADDED[added], special_tokens=ids)
    names = dict(zip(("unk_token", "bos_token", "eos_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=TEMPLATE, **names)


@pytest.fixture(
    params=[*itertools.product(FAMILIES, ADDED), ("bytes, slow", "EOS")],
    ids=lambda param: f"{param[0]}, adds {param[1]}",
)
def tokenizer(request) -> Any:
    return make(*request.param)


PLAIN = [
    ("the cat", " sat on the mat"),
    ("what is two:\n", "two and two"),
    ("what is two?\n\n", " the cat"),
    ("", "the cat sat"),
    ("", " the cat"),
    ("the cat sat. ", "on the mat"),  # a token may span the end of the prompt
    ("the c", "at sat"),
    ("the cat  ", "  sat"),
    ("two", "é 猫\n"),
]


def plain_ids(tokenizer: Any, text: str, add_special_tokens: bool) -> list[int]:
    """The whole text's ids, as the library gives them, without the EOS that it may add."""
    ids = tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]
    return ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] else ids


def characters_before(tokenizer: Any, text: str, count: int) -> tuple[int, int]:
    """Where the first `count` tokens of a plain text end, and the token after them."""
    ends = [end for _, end in tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).offsets]
    count -= len(tokenizer(text)["input_ids"][:1]) if tokenizer(text)["input_ids"][:1] == [1] else 0
    return max(ends[:count], default=0), ends[count] if count < len(ends) else len(text)


@pytest.mark.parametrize(("prompt", "response"), PLAIN)
def test_ids_of_the_whole_text(tokenizer, prompt, response):
    before, after = encode_example(tokenizer, prompt, response)
    whole = plain_ids(tokenizer, prompt + response, True)
    assert before + after == [*whole, tokenizer.eos_token_id]
    own = encode_prompt(tokenizer, prompt)
    assert own == plain_ids(tokenizer, prompt, True)
    if whole[: len(own)] == own:
        assert before == own
    elif tokenizer.is_fast:  # cut in front of the token with the response's first character
        end, following = characters_before(tokenizer, prompt + response, len(before))
        assert end <= len(prompt) < following

    row = Demonstration(prompt, response, "f:1")
    dataset, _ = tokenize_demonstrations([row], tokenizer, max_length=1024)
    assert dataset[0] == {"input_ids": before + after, "labels": [-100] * len(before) + after}
    pairs, _ = tokenize_preferences([Preference(prompt, response, " no", "f:1")], tokenizer, max_length=1024)
    assert pairs[0] == {"chosen_ids": before + after, "rejected_ids": encode_pair(tokenizer, prompt, " no")}
    assert encode_pair(tokenizer, prompt, response) == before + after
    assert tokenize_prompts([Prompt(prompt, "f:1")], tokenizer, 100, "error")[0][0][1] == own


def test_a_slow_tokenizer_has_no_offsets():
    class Slow(PreTrainedTokenizerFast):
        is_fast = property(lambda self: False)

    fast = make("byte-level", "BOS")
    slow = Slow(tokenizer_object=fast.backend_tokenizer, bos_token="<s>", eos_token="</s>")
    for prompt, response in PLAIN:
        assert encode_example(slow, prompt, response) == encode_example(fast, prompt, response)
    assert encode_example(slow, "the cat ", "sat")[0] == encode_prompt(slow, "the cat")


def test_ids_of_the_whole_dialogue(tokenizer):
    dialogue = [user("the cat"), assistant("sat on"), user("the mat")]
    text = tokenizer.apply_chat_template([*dialogue, assistant("two and")], tokenize=False)
    before, after = encode_example(tokenizer, dialogue, [assistant("two and")])
    assert [*before, *after] == [*plain_ids(tokenizer, text, False), tokenizer.eos_token_id]
    assert before == encode_prompt(tokenizer, dialogue)
    if not tokenizer.is_fast:
        return
    row = Demonstration(dialogue, [assistant("two and")], "f:1", {}, 2)
    (example,) = tokenize_demonstrations([row], tokenizer, max_length=1024)[0]
    assert example["input_ids"] == before + after
    learnt = [token for token in example["labels"] if token != -100]
    assert learnt.count(tokenizer.eos_token_id) == 2
    assert [" ".join(tokenizer.decode(part).split()) for part in split_at(learnt, tokenizer.eos_token_id)] == [
        "sat on",
        "two and",
    ]


def split_at(ids: list[int], end: int) -> list[list[int]]:
    return [list(part) for is_end, part in itertools.groupby(ids, lambda token: token == end) if not is_end]


def test_text_of_a_response_keeps_its_space(tokenizer):
    """What is decoded and encoded again, by a reward model with another tokenizer, is the text that was generated."""
    for prompt, response in (("the cat", " sat on"), ("the cat\n", "two"), ("what", "'s the")):
        before, after = encode_example(tokenizer, prompt, response)
        text = decode_response(tokenizer, prompt, before, after)
        whole = tokenizer.decode(before + after, skip_special_tokens=True)
        assert tokenizer.decode(before, skip_special_tokens=True) + text == whole
    # A message is decoded alone.
    before, after = encode_example(tokenizer, [user("the cat")], [assistant("sat on")])
    alone = tokenizer.decode(after[:-1], skip_special_tokens=True)
    assert decode_response(tokenizer, [user("the cat")], before, after) == alone


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data")
@pytest.mark.parametrize("name", ["gsm8k", "instruct-1100", "self-instruct-seeds"])
def test_ids_of_real_rows_under_a_pretrained_tokenizer(name):
    import gzip
    import json

    tokenizer = AutoTokenizer.from_pretrained(STORIES)
    with gzip.open(SHARED / name / "train.jsonl.gz", "rt") as file:
        rows = [json.loads(line) for line in itertools.islice(file, 100)]
    demonstrations = [Demonstration(row["prompt"], row["completion"], f"{name}:{n}") for n, row in enumerate(rows)]
    tokenizer.model_max_length = 10**6
    dataset, _ = tokenize_demonstrations(demonstrations, tokenizer, max_length=10**6)
    for row, ids in zip(rows, dataset, strict=True):
        whole = tokenizer(row["prompt"] + row["completion"], return_offsets_mapping=True)
        assert ids["input_ids"] == [*whole["input_ids"], 2]
        trained = [end > len(row["prompt"]) for _, end in whole["offset_mapping"]]
        assert [label != -100 for label in ids["labels"]] == [*trained, True]


class TestFindings:
    def test_token_that_spans_the_end_of_the_prompt(self, capsys):
        tokenizer = make("byte-level", "BOS")
        rows = [Demonstration("the cat ", "sat", "f:1"), Demonstration("the cat", " sat", "f:2")]
        (spanned, plain) = tokenize_demonstrations(rows, tokenizer, max_length=1024)[0]
        assert spanned == plain  # the text is the same
        assert tokenizer.decode([token for token in spanned["labels"] if token != -100]) == " sat</s>"
        said = capsys.readouterr().err
        assert "note: a token spans the end of the prompt" in said
        assert "1 of 2 rows (f:1)" in said
        tokenize_prompts([Prompt("the cat ", "f:1"), Prompt("the cat\n", "f:2")], tokenizer, 100, "error")
        assert "1 of 2 rows (f:1)" in capsys.readouterr().err

    def test_response_that_repeats_its_prompt(self, capsys):
        tokenizer = make("Unigram", "BOS")
        prompt = "what is two"
        repeated = Preference(prompt, f"{prompt} and two", f"{prompt} the cat", "f:1")
        other = Preference(prompt, " two", " the cat", "f:2")
        for is_encoder in (False, True):
            with pytest.raises(UserError, match=r"prompt: .* 1 of 1 rows \(f:1\) repeats it.*; give responses without"):
                tokenize_preferences([repeated], tokenizer, max_length=1024, is_encoder=is_encoder)
        tokenize_preferences([repeated, other], tokenizer, max_length=1024)  # it may be meant in some
        assert "note: a response repeats the whole prompt: 1 of 2 rows (f:1)" in capsys.readouterr().err
        with pytest.raises(UserError, match="repeats it"):
            tokenize_demonstrations([Demonstration(prompt, f"\n{prompt} two", "f:1")], tokenizer, max_length=1024)
        short = Preference("two", "two the", "two and", "f:1")
        tokenize_preferences([short, other], tokenizer, max_length=1024)  # by chance
        assert not capsys.readouterr().err
        rows = [short, other, Preference(prompt, f"{prompt} two", " and", "f:3")]
        with pytest.raises(UserError, match=r"2 of 3 rows \(f:3, f:1\) repeats it"):
            tokenize_preferences(rows, tokenizer, max_length=1024)

    def test_text_that_begins_with_bos(self, capsys):
        for row in (Demonstration("<s>the cat", " sat", "f:1"), Demonstration("", "<s>the cat sat", "f:1")):
            for added in ADDED:
                tokenizer = make("SentencePiece BPE, legacy", added)
                (example,) = tokenize_demonstrations([row], tokenizer, max_length=1024)[0]
                assert example["input_ids"] == [1, *tokenizer("the cat sat", add_special_tokens=False)["input_ids"], 2]
                assert ("begins with the text of <s>" in capsys.readouterr().err) == (added in ("BOS", "both"))

    def test_template_that_writes_bos_twice(self):
        tokenizer = make("byte-level", "BOS")
        tokenizer.chat_template = "{{ bos_token }}" + TEMPLATE
        with pytest.raises(BadRow, match="the chat template writes the begin-of-text token <s> twice"):
            encode_prompt(tokenizer, [user("the cat")])

    def test_date_of_a_template_is_always_the_same(self):
        tokenizer = make("byte-level", "BOS")
        tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}" + TEMPLATE
        assert tokenizer.decode(encode_prompt(tokenizer, [user("the cat")])).startswith("26 Jul 2024<s>")
