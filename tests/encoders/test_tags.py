"""Tag sets, and labels of tokens: schemes by hand, three kinds of tokenizers by hand, entity counts against seqeval."""

from __future__ import annotations

import re

import numpy as np
import pytest
from seqeval.metrics import classification_report, f1_score, precision_score, recall_score
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from align.data.annotations import join_words, read_question, read_tagged
from align.data.rows import Tagged
from align.encoders.alignment import (
    Example,
    align,
    decode,
    describe_held_out,
    describe_split,
    encode_offsets,
    tokenize_tagged,
)
from align.encoders.entity_metrics import commonest_tags, count_entities, entity_metrics
from align.encoders.tags import TagSet, entities, find_tags
from align.errors import BadRow, UserError


def tagged(tokens, tags) -> Tagged:
    return read_tagged({"tokens": tokens, "tags": tags}, "f:1", ("tokens", "tags"))


def spanned(text, *spans, **columns) -> Tagged:
    return read_tagged({"text": text, "spans": list(spans), **columns}, "f:1", ("text", "spans"))


# --- rows


@pytest.mark.parametrize(
    "spans",
    [
        [{"start": 0, "end": 3, "label": "A"}],
        [[0, 3, "A"]],
        [{"start": 0, "end": 3, "labels": ["A"], "id": "x"}],
        [{"start_offset": 0, "end_offset": 3, "label": "A", "id": 7}],
        [{"start": 0, "end": 4, "label": "A", "text": "abc "}],
        {"start": [0], "end": [3], "label": ["A"]},
    ],
)
def test_forms_of_spans(spans):
    row = read_tagged({"text": "abc de", "entities": spans}, "f:1", ("text", "entities"))
    assert row.spans == ((0, 3, "A"),)


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"tokens": ["a", "b"], "tags": ["O"]}, "differ in number"),
        ({"tokens": "a b", "tags": ["O", "O"]}, "`tokens` is not a list of words"),
        ({"tokens": ["a", " "], "tags": ["O", "O"]}, "`tokens` has an empty word"),
        ({"tokens": ["a", "b"], "tags": ["O", 1]}, "`tags` is not a list of names or of ids"),
        ({"tokens": ["a"], "tags": [True]}, "`tags` is not a list of names or of ids"),
        ({"text": "abc", "spans": [[0, 4, "A"]]}, "empty or goes beyond the text"),
        ({"text": "abc", "spans": [[2, 2, "A"]]}, "empty or goes beyond the text"),
        ({"text": "abc", "spans": [[-1, 2, "A"]]}, "not an offset in characters"),
        ({"text": "abc", "spans": [[0, "2", "A"]]}, "not an offset in characters"),
        ({"text": "a  c", "spans": [[1, 3, "A"]]}, "white space alone"),
        ({"text": "abc", "spans": [[0, 2, "A"], [1, 3, "B"]]}, "spans that overlap"),
        ({"text": "abc", "spans": [[0, 2, ""]]}, "without a `label` in text"),
        ({"text": "abc", "spans": [{"start": 0, "end": 2, "labels": ["A", "B"]}]}, "without a `label` in text"),
        ({"text": "abc", "spans": [{"start": 0, "end": 2, "label": "A", "text": "bc"}]}, "not what its offsets cover"),
        ({"text": "abc", "spans": ["A"]}, "not a list of {start, end, label}"),
        ({"text": "abc", "spans": 3}, "neither a list nor a mapping of lists"),
        ({"text": " ", "spans": []}, "empty `text`"),
    ],
)
def test_rows_that_are_refused(columns, said):
    with pytest.raises(BadRow, match=re.escape(said)):
        read_tagged(columns, "f:1", tuple(columns))


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"answers": {"text": ["def"], "answer_start": [3]}}, "is not what the context has"),
        ({"answers": {"text": ["def"], "answer_start": [-2]}}, "not an offset in characters"),
        ({"answers": [{"text": "", "answer_start": 4}]}, "without `text`"),
        ({"answers": {"text": ["def", "abc"], "answer_start": [4]}}, "lists of different lengths"),
        ({"answers": "def"}, "neither a list nor a mapping"),
        ({"answers": [{"text": "def", "answer_start": 4}], "is_impossible": True}, "`is_impossible`"),
        ({"answers": [], "question": 3}, "`question` is not text"),
    ],
)
def test_questions_that_are_refused(columns, said):
    with pytest.raises(BadRow, match=re.escape(said)):
        read_question({"question": "what?", "context": "abc def", **columns}, "f:1")


# --- schemes


@pytest.mark.parametrize(
    ("scheme", "tags"),
    [
        ("IOB2", "O B-X I-X B-X O B-Y"),
        ("BILOU", "O B-X L-X U-X O U-Y"),
        ("IOBES", "O B-X E-X S-X O S-Y"),
    ],
)
def test_schemes_mark_the_same_entities(scheme, tags):
    assert entities(tags.split(), scheme) == [(1, 2, "X"), (3, 3, "X"), (5, 5, "Y")]
    row = tagged(list("abcdef"), tags.split())
    assert find_tags([row], [], [], "error").scheme == scheme


def test_long_entities_with_m_and_types_with_hyphens():
    assert entities(["B-a-b", "M-a-b", "M-a-b", "E-a-b"], "IOBES") == [(0, 3, "a-b")]
    assert entities(["B-X", "I-X", "I-X", "L-X"], "BILOU") == [(0, 3, "X")]
    assert entities(["B-X", "B-X", "I-X"], "IOB2") == [(0, 0, "X"), (1, 2, "X")]


def test_tags_without_marks_are_runs_if_there_is_an_o_and_tags_of_words_otherwise():
    runs = find_tags([tagged(["a", "b", "c", "d"], ["X", "X", "O", "Y"])], [], [], "error")
    assert (runs.scheme, runs.labels) == ("IO", ["O", "B-X", "I-X", "B-Y", "I-Y"])
    assert entities(["X", "X", "O", "Y"], "IO") == [(0, 1, "X"), (3, 3, "Y")]
    words = find_tags([tagged(["a", "b", "c"], ["N", "N", "V"])], [], [], "error")
    assert (words.scheme, words.labels, words.frequency) == ("words", ["N", "V"], [2, 1])
    assert words.spans_of(tagged(["ab", "c"], ["N", "V"])) == [(0, 2, "N"), (3, 4, "V")]


def test_ids_have_the_names_of_the_recipe():
    row = tagged(["a", "b"], [1, 2])
    tag_set = find_tags([row], [], ["O", "B-X", "I-X"], "error")
    assert tag_set.spans_of(row) == [(0, 3, "X")]
    with pytest.raises(UserError, match=r"label_names: f:1 has `tags` in ids; give their names"):
        find_tags([row], [], [], "error")
    with pytest.raises(UserError, match=r"label_names: no row has `tags` in ids"):
        find_tags([tagged(["a"], ["B-X"])], [], ["O"], "error")
    with pytest.raises(UserError, match=r"an id outside of 0 to 1"):
        find_tags([row], [], ["O", "B-X"], "error")


@pytest.mark.parametrize(
    ("tags", "said"),
    [
        ("O I-X", "after none of its type"),
        ("B-X I-Y", "after none of its type"),
        ("B-X O L-X", "without its last word, L-"),
        ("B-X B-X E-X", "without its last word, E-"),
        ("L-X", "after none of its type"),
        ("B-X E-X L-X", "of both BILOU and IOBES"),
        ("B-X PER", r"'B-X', and f:1 has 'PER'"),
        ("O O", "no entity, so there is nothing to learn"),
        ("N N", "the tag N alone"),
    ],
)
def test_sequences_that_are_refused(tags, said):
    with pytest.raises(UserError, match=said) as error:
        find_tags([tagged(["a"] * len(tags.split()), tags.split())], [], [], "error")
    assert "f:1" in str(error.value) or "training rows" in str(error.value) or "both" in str(error.value)


def test_bad_sequences_can_be_skipped_and_new_types_are_named():
    good, bad = tagged(["a", "b"], ["B-X", "O"]), tagged(["a"], ["I-X"])
    assert find_tags([good, bad], [bad], [], "skip").frequency == [1]
    with pytest.raises(UserError, match=r"f:1: 'XY' of an evaluation row occurs in no training row; these have X"):
        find_tags([good], [tagged(["a"], ["B-XY"])], [], "error")
    with pytest.raises(UserError, match=r"has a tag for each word .* has spans"):
        find_tags([tagged(["a", "b"], ["N", "V"]), spanned("ab", [0, 2, "X"])], [], [], "error")


# --- tokens


def wordpiece() -> PreTrainedTokenizerFast:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "wash", "##ing", "##ton", "in", ".", "new", "york", "'", "s"]
    made = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]")


def byte_level(trim: bool) -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate([*alphabet, "Wa", "Ġi", "Ġin", "ĠN", "ĠNe", "ĠNew"])}
    merges = [("W", "a"), ("Ġ", "i"), ("Ġi", "n"), ("Ġ", "N"), ("ĠN", "e"), ("ĠNe", "w")]
    made = Tokenizer(models.BPE(vocabulary, merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.post_processor, made.decoder = processors.ByteLevel(trim_offsets=trim), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made)


def unigram() -> PreTrainedTokenizerFast:
    pieces = ["<unk>", "▁", "▁Wash", "ington", "▁in", "▁New", "▁York", ".", "'", "s", "▁Wa"]
    made = Tokenizer(models.Unigram([(piece, -float(i)) for i, piece in enumerate(pieces)], 0))
    made.normalizer = normalizers.Replace(" {2,}", " ")
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")


TEXT = "Washington in New York's."
SPANS = ([0, 10, "PER"], [14, 22, "LOC"])
LABELS = {
    # [CLS] wash ##ing ##ton in new york ' s . [SEP]
    "wordpiece": (wordpiece(), ["", "B-PER", "I-PER", "I-PER", "O", "B-LOC", "I-LOC", "O", "O", "O", ""]),
    # Wa s h i n g t o n | _in | _New | _ Y o r k | ' s .; the space before York is a token of its own, in no entity
    "bytes": (byte_level(False), ["B-PER", *["I-PER"] * 8, "O", "B-LOC", "", *["I-LOC"] * 4, "O", "O", "O"]),
    "bytes, trimmed": (byte_level(True), ["B-PER", *["I-PER"] * 8, "O", "B-LOC", "", *["I-LOC"] * 4, "O", "O", "O"]),
    # _Wash ington _in _New _York ' s .
    "unigram": (unigram(), ["B-PER", "I-PER", "O", "B-LOC", "I-LOC", "O", "O", "O"]),
}  # fmt: skip


@pytest.mark.parametrize("name", LABELS)
def test_labels_of_tokens_by_hand(name):
    tokenizer, labels = LABELS[name]
    row = spanned(TEXT, *SPANS)
    _, offsets = encode_offsets(tokenizer, TEXT)
    found, example = align(row, list(row.spans), offsets, "spans")
    assert found == labels
    assert decode([found[place] for place in example.places], example.units, "spans") == [
        (0, 10, "PER"),
        (14, 22, "LOC"),
    ]
    assert describe_split([example]) is None


@pytest.mark.parametrize("name", LABELS)
def test_words_are_read_at_their_first_token_whatever_the_others_say(name):
    tokenizer, labels = LABELS[name]
    row = tagged(["Washington", "in", "New", "York", "'s."], ["B-PER", "O", "B-LOC", "I-LOC", "O"])
    assert row.text == "Washington in New York 's."
    data, (example,), _ = tokenize_tagged(
        [row], tokenizer, find_tags([row], [], [], "error"), max_length=99, on_bad_row="error"
    )
    names = ["O", "B-LOC", "I-LOC", "B-PER", "I-PER"]
    assert [names[each] if each >= 0 else "" for each in data[0]["labels"]].count("I-PER") == labels.count("I-PER")
    assert data[0]["weight"] == sum(each >= 0 for each in data[0]["labels"])
    assert example.units == list(row.words)
    read = ["O"] * len(data[0]["labels"])
    for place, label in zip(example.places, ["B-PER", "O", "B-LOC", "I-LOC", "O"], strict=True):
        assert names[data[0]["labels"][place]] == label
        read[place] = label
    assert decode([read[place] for place in example.places], example.units, "IOB2") == [(0, 10, "PER"), (14, 22, "LOC")]


def test_words_equal_transformers_own_alignment_of_split_words():
    tokenizer = LABELS["wordpiece"][0]
    words = ["washington", "in", "new", "york", "'s."]
    _, places = join_words(words)
    ids, offsets = encode_offsets(tokenizer, " ".join(words))
    split = tokenizer(words, is_split_into_words=True)
    assert ids == split["input_ids"]
    of = [next((w for w, (s, e) in enumerate(places) if s <= start < end <= e), None) for start, end in offsets]
    assert of == split.word_ids()


def test_marks_belong_to_the_letter_before_them_though_the_tokenizer_drops_them():
    text = "wash\u0301 in"  # BERT strips the accent
    row = spanned(text, [0, 5, "X"], [6, 8, "Y"])
    labels, example = align(row, list(row.spans), encode_offsets(LABELS["wordpiece"][0], text)[1], "spans")
    assert labels == ["", "B-X", "B-Y", ""]
    assert example.units == [(0, 5), (6, 8)]
    assert describe_split([example]) is None


def test_a_span_inside_a_token_takes_the_whole_token_and_is_counted():
    tokenizer = LABELS["unigram"][0]
    row = spanned(TEXT, [0, 8, "X"])  # "Washingt"
    _, (example,), _ = tokenize_tagged(
        [row], tokenizer, find_tags([row], [], [], "error"), max_length=99, on_bad_row="error"
    )
    assert describe_split([example]).startswith("1 of 1 labeled spans begin or end inside a token")


def test_evaluation_rows_without_any_entity_are_said_to_measure_nothing():
    tokenizer = LABELS["wordpiece"][0]
    some, none = (
        align(row, list(row.spans), encode_offsets(tokenizer, TEXT)[1], "spans")[1]
        for row in (spanned(TEXT, *SPANS), spanned(TEXT))
    )
    assert describe_held_out([none, some]) is None
    assert describe_held_out([]) is None
    assert describe_held_out([none, none]).startswith("none of the 2 evaluation rows has an entity")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (spanned("New\u0000 York", [3, 4, "X"]), "no token: the tokenizer drops its characters"),
        (spanned("Washington", [0, 5, "X"], [5, 10, "X"]), "share a token"),
        (spanned("New " * 20, [0, 3, "X"]), "longer than 12 tokens (`max_length`)"),
        (tagged(["in", "York"], ["B-X", "I-X"]), "two words share a token"),
    ],
)
def test_rows_that_a_tokenizer_cannot_label(row, said):
    tokenizer = LABELS["wordpiece"][0]
    words = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    words.add_tokens(["washington", "in York"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]")
    with pytest.raises(UserError, match=re.escape(said)) as error:
        tokenize_tagged([row], tokenizer, TagSet("spans", ["X"], [1]), max_length=12, on_bad_row="error")
    assert "f:1" in str(error.value)


# --- metrics


def example_of(true) -> Example:
    row = tagged([f"w{i}" for i in range(len(true))], true)
    gold = TagSet("IOB2", [], []).spans_of(row)
    return Example(row, gold, list(range(len(true))), list(row.words), 0)


PUBLISHED = (  # of seqeval's README
    [["O", "O", "O", "B-MISC", "I-MISC", "I-MISC", "O"], ["B-PER", "I-PER", "O"]],
    [["O", "O", "B-MISC", "I-MISC", "I-MISC", "I-MISC", "O"], ["B-PER", "I-PER", "O"]],
)
RANDOM = np.random.default_rng(0)


def random_rows():
    """Valid gold tags, and predictions of which many are invalid."""
    true, predicted = [], []
    for _ in range(60):
        size = int(RANDOM.integers(1, 12))
        predicted.append([str(tag) for tag in RANDOM.choice(["O", "B-A", "I-A", "B-B", "I-B", "B-C"], size)])
        gold: list[str] = []
        for tag in RANDOM.choice(["O", "B-A", "I-A", "B-B", "I-B"], size):
            valid = tag[0] != "I" or (gold and gold[-1][2:] == tag[2:])
            gold.append(str(tag) if valid else "O")
        true.append(gold)
    return true, predicted


@pytest.mark.parametrize(("true", "predicted"), [PUBLISHED, random_rows()])
def test_metrics_equal_seqevals(true, predicted):
    types = [*sorted({tag[2:] for row in (*true, *predicted) for tag in row if tag != "O"}), "in training alone"]
    counts = []
    for gold, said in zip(true, predicted, strict=True):
        example = example_of(gold)
        counts.append(count_entities(types, decode(said, example.units, "IOB2"), example.gold))
    found = entity_metrics(np.array(counts))
    assert found["precision"] == pytest.approx(precision_score(true, predicted))
    assert found["recall"] == pytest.approx(recall_score(true, predicted))
    assert found["f1"] == pytest.approx(f1_score(true, predicted))
    assert found["f1_low"] <= found["f1"] <= found["f1_high"]
    report = classification_report(true, predicted, output_dict=True, zero_division=0)
    assert found["macro_f1"] == pytest.approx(report["macro avg"]["f1-score"])


def test_the_published_number_is_a_half():
    assert f1_score(*PUBLISHED) == 0.5


def test_the_baseline_gives_each_word_its_commonest_tag():
    train = [tagged(["in", "Rome"], ["O", "B-L"]), tagged(["Rome", "Rome"], ["B-P", "B-L"])]
    held_out = [tagged(["Rome", "Oslo"], ["B-L", "B-L"]), tagged(["in"], ["B-P"])]
    tag_set = find_tags(train, held_out, [], "error")
    tokenizer = LABELS["unigram"][0]
    sides = [
        tokenize_tagged(rows, tokenizer, tag_set, max_length=99, on_bad_row="error")[1] for rows in (train, held_out)
    ]
    counts = commonest_tags(tag_set, *sides)
    assert counts.sum(axis=0).tolist() == [[1, 1, 2], [0, 0, 1]]  # L: Rome; Oslo is unknown, "in" was O
    spans = [spanned("go to Rome!", [6, 10, "L"]), spanned("to New York", [3, 11, "L"])]
    tag_set = find_tags(spans, [], [], "error")
    examples = tokenize_tagged(spans, tokenizer, tag_set, max_length=99, on_bad_row="error")[1]
    assert commonest_tags(tag_set, examples, examples).tolist() == [[[1, 1, 1]], [[1, 1, 1]]]
