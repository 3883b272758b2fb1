"""Token ids and labels, read off by hand and held to the rules that all stages rely on."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from tokenizers.normalizers import Lowercase
from tokenizers.trainers import BpeTrainer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from align.config.data_source import DataSource
from align.data.batches import PromptLoader, pad_to_batches
from align.data.encode import encode_pair, encode_prompt
from align.data.load import DataSettings, load_rows
from align.data.rows import Demonstration, Preference, Prompt, Turns
from align.data.tokenize import tokenize_demonstrations, tokenize_preferences, tokenize_prompts
from align.errors import BadRow, UserError
from tests.data.messages import assistant, encode_response, user

SHARED = Path(__file__).parents[3] / "shared" / "data"
STORIES = SHARED / "stories260K" / "hf"

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# BOS in front, EOS straight after the assistant's words only, nothing after it.
LLAMA = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'assistant' %} {{ message.content }}{{ eos_token }}"
    "{% else %}[INST] {{ message.content }} [/INST]{% endif %}{% endfor %}"
)
# The last assistant turn opens with a marker that earlier turns do not have.
UNSTABLE = CHATML.replace(
    "{{ message.content }}",
    "{% if loop.last and message.role == 'assistant' %}<think></think>{% endif %}{{ message.content }}",
)


def make_tokenizer(
    special: list[str],
    template: str | None = None,
    post_processor: str | None = None,
    lowercase: bool = False,
    **tokens: str,
) -> PreTrainedTokenizerFast:
    """A byte-level BPE whose special tokens have the ids 0, 1, 2, ..."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    words = ["the cat sat on the mat", "what is two and two", "user assistant system"] * 4
    tokenizer.train_from_iterator(words, BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet))
    if lowercase:
        tokenizer.normalizer = Lowercase()
    if post_processor:
        ids = [(token, special.index(token)) for token in special]
        tokenizer.post_processor = processors.TemplateProcessing(single=post_processor, special_tokens=ids)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", **tokens)
    fast.chat_template = template
    return fast


def chatml(template: str = CHATML) -> PreTrainedTokenizerFast:
    """No BOS; padding is EOS; the template puts a line break after EOS."""
    return make_tokenizer(["<|im_start|>", "<|im_end|>"], template, eos_token="<|im_end|>", pad_token="<|im_end|>")


def llama(post_processor: str = "<s> $A") -> PreTrainedTokenizerFast:
    """The tokenizer adds BOS, and so does the template."""
    return make_tokenizer(["<s>", "</s>"], LLAMA, post_processor, bos_token="<s>", eos_token="</s>", pad_token="</s>")


def stories() -> PreTrainedTokenizerFast:
    """A pretrained tokenizer that puts a space in front of each text; the template has no special token."""
    if not STORIES.is_dir():
        pytest.skip("needs ../shared/data/stories260K")
    tokenizer = AutoTokenizer.from_pretrained(STORIES)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    return tokenizer


TOKENIZERS = {"chatml": chatml, "llama": llama, "stories": stories}


def learnt(tokenizer: Any, row: Demonstration, **keys: Any) -> list[str]:
    """The stretches of text that the row's labels cover."""
    dataset, _ = tokenize_demonstrations([row], tokenizer, **{"max_length": 1024, **keys})
    stretches: list[list[int]] = [[]]
    for token, label in zip(dataset[0]["input_ids"], dataset[0]["labels"], strict=True):
        if label == -100:
            stretches.append([])
        else:
            assert label == token
            stretches[-1].append(token)
    return [tokenizer.decode(stretch) for stretch in stretches if stretch]


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request) -> Any:
    return TOKENIZERS[request.param]()


EXAMPLES: list[tuple[Turns, Turns]] = [
    ("what is two", " the cat"),
    ("", "the cat sat on the mat"),
    ([user("what is two")], [assistant("the cat")]),
    ([user("the cat"), assistant("sat"), user("on the mat")], [assistant("é 猫 \n two")]),
]


class TestEveryTokenizer:
    @pytest.mark.parametrize(("prompt", "response"), EXAMPLES)
    def test_prompt_then_response_with_one_eos(self, tokenizer, prompt, response):
        before, after = encode_prompt(tokenizer, prompt), encode_response(tokenizer, prompt, response)
        assert after[-1] == tokenizer.eos_token_id
        assert after.count(tokenizer.eos_token_id) == 1
        whole = encode_pair(tokenizer, prompt, response)
        assert whole == before + after
        if tokenizer.bos_token_id is not None:
            assert whole.count(tokenizer.bos_token_id) <= 1
            assert tokenizer.bos_token_id not in after

        dataset, _ = tokenize_demonstrations([Demonstration(prompt, response, "f:1")], tokenizer, max_length=1024)
        assert dataset[0]["input_ids"] == whole
        assert dataset[0]["labels"] == [-100] * len(before) + after  # EOS is learnt also where it is the padding token
        dataset, _ = tokenize_demonstrations(
            [Demonstration(prompt, response, "f:1")], tokenizer, max_length=1024, completion_only_loss=False
        )
        assert dataset[0]["labels"] == dataset[0]["input_ids"] == whole

    @pytest.mark.parametrize(("prompt", "response"), EXAMPLES)
    def test_all_stages_see_the_same_ids(self, tokenizer, prompt, response):
        other: Turns = " no" if isinstance(response, str) else [assistant("no")]
        dataset, _ = tokenize_preferences([Preference(prompt, response, other, "f:1")], tokenizer, max_length=1024)
        assert dataset[0] == {
            "chosen_ids": encode_pair(tokenizer, prompt, response),
            "rejected_ids": encode_pair(tokenizer, prompt, other),
        }
        row = Prompt(prompt, "f:1")
        assert tokenize_prompts([row], tokenizer, 100, "error") == ([(row, encode_prompt(tokenizer, prompt))], {})
        text = response if isinstance(response, str) else response[0]["content"]
        assert encode_pair(tokenizer, prompt, text) == encode_pair(tokenizer, prompt, response)

    def test_rows_of_mixed_kinds_keep_their_order(self, tokenizer):
        rows = [Demonstration(prompt, response, "f:1") for prompt, response in EXAMPLES] * 3
        dataset, _ = tokenize_demonstrations(rows, tokenizer, max_length=1024)
        assert dataset["input_ids"][:] == [encode_pair(tokenizer, row.prompt, row.completion) for row in rows]


class TestByHand:
    def test_text(self):
        tokenizer = llama()
        plain = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
        assert encode_prompt(tokenizer, "the cat") == [0, *plain("the cat")]
        assert encode_response(tokenizer, "the cat", " sat") == [*plain(" sat"), 1]
        assert encode_prompt(tokenizer, "") == [0]
        assert encode_response(tokenizer, "the cat", "") == [1]  # a sampled response may be empty

    @pytest.mark.parametrize("post_processor", ["<s> $A", "<s> $A </s>", "$A </s>", "$A"])
    def test_no_eos_after_a_prompt_whatever_the_tokenizer_adds(self, post_processor):
        tokenizer = llama(post_processor)
        bos = [0] if "<s>" in post_processor else []
        for text in ("the cat", ""):
            words = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert encode_prompt(tokenizer, text) == bos + words
            assert encode_response(tokenizer, "p", text) == [*words, 1]

    def test_bos_that_is_eos_stays_in_front(self):
        tokenizer = make_tokenizer(["<|end|>"], None, "<|end|> $A", bos_token="<|end|>", eos_token="<|end|>")
        words = tokenizer("the cat", add_special_tokens=False)["input_ids"]
        assert encode_prompt(tokenizer, "the cat") == [0, *words]
        assert encode_prompt(tokenizer, "") == [0]
        assert encode_response(tokenizer, "the cat", "the cat") == [*words, 0]
        assert encode_prompt(tokenizer, "the cat<|end|>the cat") == [0, *words, 0, *words]  # an earlier text's end

    def test_messages_with_a_line_break_after_eos(self):
        tokenizer = chatml()
        prompt = [user("two")]
        assert tokenizer.decode(encode_prompt(tokenizer, prompt)) == (
            "<|im_start|>user\ntwo<|im_end|>\n<|im_start|>assistant\n"
        )
        assert tokenizer.decode(encode_response(tokenizer, prompt, [assistant("cat")])) == "cat<|im_end|>"

    def test_messages_with_bos_in_the_template(self):
        tokenizer = llama()
        prompt = [user("two")]
        assert tokenizer.decode(encode_prompt(tokenizer, prompt)) == "<s>[INST] two [/INST]"
        assert tokenizer.decode(encode_response(tokenizer, prompt, [assistant("cat")])) == " cat</s>"

    def test_template_without_eos(self):
        tokenizer = stories()
        prompt = [user("two")]
        assert tokenizer.decode(encode_prompt(tokenizer, prompt)).strip() == "user: two\nassistant:"
        ids = encode_response(tokenizer, prompt, [assistant("cat")])
        assert ids[-1] == 2
        assert tokenizer.decode(ids[:-1]).strip() == "cat"

    def test_encoder_pairs(self):
        tokenizer = make_tokenizer(["[CLS]", "[SEP]"], sep_token="[SEP]")
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 0), ("[SEP]", 1)]
        )
        first = tokenizer("User: two\n\nAssistant: cat\n\nUser: mat", add_special_tokens=False)["input_ids"]
        second, third = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("sat", "on"))
        prompt = [user("two"), assistant("cat"), user("mat")]
        row = Preference(prompt, [assistant("sat")], [assistant("on")], "f:1")
        dataset, _ = tokenize_preferences([row], tokenizer, max_length=1024, is_encoder=True)
        assert dataset[0]["chosen_ids"] == [0, *first, 1, *second, 1]
        assert dataset[0]["rejected_ids"] == [0, *first, 1, *third, 1]
        assert encode_pair(tokenizer, prompt, "sat", is_encoder=True) == [0, *first, 1, *second, 1]

    def test_every_assistant_turn_of_a_dialogue(self):
        dialogue = [user("two"), assistant("cat"), user("mat"), assistant("sat"), user("on")]
        for tokenizer, turns in (
            (chatml(), ["cat<|im_end|>", "sat<|im_end|>", "the<|im_end|>"]),
            (llama(), [" cat</s>", " sat</s>", " the</s>"]),
        ):
            for trained in (1, 2, 3):
                row = Demonstration(dialogue, [assistant("the")], "f:1", {}, trained)
                assert learnt(tokenizer, row) == turns[3 - trained :]
            row = Demonstration(dialogue, [assistant("the")], "f:1", {}, 3)
            dataset, _ = tokenize_demonstrations([row], tokenizer, max_length=1024)
            prompt = encode_prompt(tokenizer, dialogue)
            assert dataset[0]["input_ids"][: len(prompt)] == prompt
            assert len(learnt(tokenizer, row, completion_only_loss=False)) == 1

    def test_a_dialogue_without_eos_in_its_template(self):
        tokenizer = stories()
        row = Demonstration([user("two"), assistant("cat"), user("mat")], [assistant("sat")], "f:1", {}, 2)
        assert [stretch.strip() for stretch in learnt(tokenizer, row)] == ["cat", "sat\n</s>"]


class TestSpeltOutTokens:
    """The text of BOS or EOS in the data, which tokenizers turn into the token."""

    def test_eos_that_ends_a_completion_is_the_eos(self):
        tokenizer = llama()
        assert encode_response(tokenizer, "p", "the cat</s>\n") == encode_response(tokenizer, "p", "the cat")

    def test_bos_that_begins_a_prompt_is_the_bos(self):
        tokenizer = llama()
        assert encode_prompt(tokenizer, "<s>the cat") == encode_prompt(tokenizer, "the cat")
        assert encode_prompt(llama("$A"), "<s>the cat").count(0) == 1

    @pytest.mark.parametrize(
        ("prompt", "response", "reason"),
        [
            ("p", "the </s> cat", "the text of the end-of-text token </s> inside the response"),
            ("p", "</s>", "empty response"),
            ("p", "<s>the cat", "the text of the begin-of-text token <s> in the response"),
            ("p <s>", "the cat", "the text of the begin-of-text token <s> in the prompt"),
            ([user("p")], [assistant("the </s> cat")], "the text of the special token </s> in a message"),
            ([user("p</s>")], [assistant("the cat")], "the text of the special token </s> in a message"),
            ([user("<s>p")], [assistant("the cat")], "the text of the special token <s> in a message"),
        ],
    )
    def test_elsewhere_the_row_is_bad(self, prompt, response, reason):
        row = Demonstration(prompt, response, "f:7")
        with pytest.raises(UserError, match="f:7") as caught:
            tokenize_demonstrations([row], llama(), max_length=1024)
        assert f"{reason}: 1" in str(caught.value)

    @pytest.mark.parametrize("prompt", ["p", [user("p")]])
    def test_sampled_text_is_always_encoded(self, prompt):
        tokenizer = llama()
        assert encode_pair(tokenizer, prompt, "the</s> cat<s>") == encode_pair(tokenizer, prompt, "the cat")
        assert encode_pair(tokenizer, prompt, "")[-1] == 1


class TestBadRows:
    def test_too_long_is_not_cut(self):
        tokenizer = llama()
        rows = [Demonstration("the cat", " sat", "f:1"), Demonstration("the cat", " sat" * 20, "f:2")]
        size = len(encode_pair(tokenizer, "the cat", " sat"))
        dataset, report = tokenize_demonstrations(rows, tokenizer, max_length=size, on_bad_row="skip")
        assert dataset["input_ids"][:] == [encode_pair(tokenizer, "the cat", " sat")]
        assert report == {f"longer than {size} tokens (`max_length`)": {"count": 1, "first": ["f:2"]}}
        with pytest.raises(UserError, match=rf"2 rows cannot be used:\n  longer than {size - 1} .*2 \(f:1, f:2\)"):
            tokenize_demonstrations(rows, tokenizer, max_length=size - 1)

    def test_either_response_of_a_pair_may_be_too_long(self):
        tokenizer = llama()
        rows = [
            Preference("p", " a", " b" * 99, "f:1"),
            Preference("p", " b" * 99, " a", "f:2"),
            Preference("p", "a", "b", "f:3"),
        ]
        dataset, report = tokenize_preferences(rows, tokenizer, max_length=50, on_bad_row="skip")
        assert len(dataset) == 1
        assert report == {"longer than 50 tokens (`max_length`)": {"count": 2, "first": ["f:1", "f:2"]}}

    def test_prompts(self):
        tokenizer = llama()
        rows = [Prompt("p" * 9, "f:1"), Prompt("p" * 10, "f:2")]  # and BOS
        prompts, report = tokenize_prompts(rows, tokenizer, 10, "skip")
        assert [row.where for row, _ in prompts] == ["f:1"]
        assert report == {"longer than 10 tokens (`max_prompt_length`)": {"count": 1, "first": ["f:2"]}}
        with pytest.raises(UserError, match="f:2"):
            tokenize_prompts(rows, tokenizer, 10, "error")

    def test_limit_of_the_tokenizer(self):
        tokenizer = llama()
        tokenizer.model_max_length = 10
        reason = "longer than 10 tokens (the tokenizer's model_max_length)"
        for result in (
            tokenize_prompts([Prompt("p" * 9, "f:1"), Prompt("p" * 10, "f:2")], tokenizer, 100, "skip"),
            tokenize_demonstrations(
                [Demonstration("p", "c", "f:1"), Demonstration("p", "c" * 10, "f:2")],
                tokenizer,
                max_length=1024,
                on_bad_row="skip",
            ),
            tokenize_preferences(
                [Preference("p", "c", "d", "f:1"), Preference("p", "c", "d" * 10, "f:2")],
                tokenizer,
                max_length=1024,
                on_bad_row="skip",
            ),
        ):
            assert len(result[0]) == 1
            assert result[1] == {reason: {"count": 1, "first": ["f:2"]}}

    def test_pair_that_the_tokenizer_cannot_tell_apart(self):
        tokenizer = make_tokenizer(["</s>"], lowercase=True, eos_token="</s>")
        with pytest.raises(UserError, match="`chosen` and `rejected` have the same tokens: 1"):
            tokenize_preferences([Preference("p", "Yes", "yes", "f:1")], tokenizer, max_length=1024)

    def test_truncation_that_a_tokenizer_file_asks_for(self):
        tokenizer = llama()
        tokenizer.backend_tokenizer.enable_truncation(4)
        tokenizer.backend_tokenizer.enable_padding(length=4)
        assert len(encode_pair(tokenizer, "p" * 20, "c" * 20)) == 42
        assert len(encode_pair(tokenizer, "p", "c")) == 4
        tokenizer.backend_tokenizer.enable_truncation(4)
        assert len(encode_pair(tokenizer, "p" * 20, "c" * 20, is_encoder=True)) == 40

    def test_no_chat_template(self):
        tokenizer = chatml()
        tokenizer.chat_template = None
        for call in (
            lambda: tokenize_prompts([Prompt([user("p")], "f:1")], tokenizer, 9, "skip"),
            lambda: tokenize_demonstrations(
                [Demonstration([user("p")], [assistant("c")], "f:1")], tokenizer, max_length=1024
            ),
            lambda: encode_pair(tokenizer, [user("p")], "c"),
        ):
            with pytest.raises(UserError, match=r"no chat template.*`chat_template_path`"):
                call()

    def test_template_that_refuses(self):
        tokenizer = chatml(
            "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
        )
        rows = [Prompt([{"role": "system", "content": "s"}, user("p")], "f:1"), Prompt([user("p")], "f:2")]
        prompts, report = tokenize_prompts(rows, tokenizer, 100, "skip")
        assert [row.where for row, _ in prompts] == ["f:2"]
        assert report == {"the chat template of the tokenizer rejects it: no system": {"count": 1, "first": ["f:1"]}}

    def test_a_template_may_write_nothing_after_eos(self):
        tokenizer = chatml(CHATML.replace("<|im_end|>\n", "<|im_end|>\nnext"))
        with pytest.raises(BadRow, match=r"end-of-text token <\|im_end\|> inside the response"):
            encode_response(tokenizer, [user("p")], [assistant("c")])

    def test_nothing_left(self):
        tokenizer = llama()
        with pytest.raises(UserError, match=r"none of 1 rows can be used \(longer than 2 tokens \(`max_length`\): 1\)"):
            tokenize_demonstrations([Demonstration("p", "c", "f:1")], tokenizer, max_length=2, on_bad_row="skip")
        dataset, report = tokenize_demonstrations([], tokenizer, max_length=1024)
        assert (len(dataset), dataset.column_names, report) == (0, ["input_ids", "labels"], {})


class TestPromptLoader:
    @pytest.mark.parametrize("batch_size", [1, 3, 7, 10, 25])
    def test_each_prompt_once_an_epoch(self, batch_size):
        loader = PromptLoader(10, seed=3)
        drawn = [index for update in range(50) for index in loader.batch(update, batch_size)]
        for start in range(0, len(drawn) - 10, 10):
            assert sorted(drawn[start : start + 10]) == list(range(10))

    def test_order_is_new_each_epoch_and_a_function_of_seed_and_update(self):
        epochs = [tuple(PromptLoader(20, seed=3).batch(epoch, 20)) for epoch in range(5)]
        assert len(set(epochs)) == 5
        assert tuple(PromptLoader(20, seed=3).batch(4, 20)) == epochs[4]
        assert tuple(PromptLoader(20, seed=4).batch(4, 20)) != epochs[4]
        assert epochs[0] != tuple(range(20))

    def test_ranks_share_out_the_set(self):
        loader = PromptLoader(12, seed=0)
        ranks = [[i for update in range(3) for i in loader.batch(update, 4)[2 * r : 2 * r + 2]] for r in range(2)]
        assert sorted(ranks[0] + ranks[1]) == list(range(12))


class TestPadding:
    def demonstrations(self, count: int) -> Any:
        rows = [Demonstration(f"{i}", "the cat", f"f:{i}") for i in range(count)]
        return tokenize_demonstrations(rows, chatml(), max_length=1024)[0]

    @pytest.mark.parametrize(("count", "batch_size", "padded"), [(8, 4, 8), (9, 4, 12), (3, 8, 8), (0, 4, 0)])
    def test_rows_without_labels_fill_the_last_batch(self, count, batch_size, padded):
        dataset = self.demonstrations(count)
        longer = pad_to_batches(dataset, batch_size)
        assert len(longer) == padded
        assert longer[:count] == dataset[:]
        assert longer.features == dataset.features
        for row in list(longer)[count:]:
            assert set(row["labels"]) == {-100}
            assert len(row["labels"]) == len(row["input_ids"]) > 0

    def test_pairs_without_gradient_fill_the_last_batch(self):
        rows = [Preference(f"{i}", "the cat", "the mat", f"f:{i}") for i in range(3)]
        dataset, _ = tokenize_preferences(rows, chatml(), max_length=1024)
        longer = pad_to_batches(dataset, 2)
        assert len(longer) == 4
        assert longer[:3] == dataset[:]
        assert longer[3]["chosen_ids"] == longer[3]["rejected_ids"]

    @pytest.mark.parametrize("world_size", [1, 2, 3])
    def test_ranks_see_each_row_once(self, world_size):
        dataset = pad_to_batches(self.demonstrations(10), world_size * 2)
        shares = [list(range(rank, len(dataset), world_size)) for rank in range(world_size)]
        assert len({len(share) for share in shares}) == 1
        seen = Counter(i for share in shares for i in share if set(dataset[i]["labels"]) != {-100})
        assert seen == Counter(range(10))


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data")
class TestRealData:
    @pytest.mark.parametrize("name", ["hh-helpful", "hh-harmless", "politeness-pairs", "topical-chat-ratings"])
    def test_preferences(self, name):
        tokenizer = stories()
        tokenizer.chat_template = CHATML.replace("<|im_end|>", "{{ eos_token }}")
        tokenizer.model_max_length = 10**6
        source = DataSource(path=str(SHARED / name / "train.jsonl.gz"), max_rows=200)
        settings = DataSettings(train_dataset=[source], on_bad_row="skip", seed=42)
        rows = load_rows(settings, Preference).train
        dataset, report = tokenize_preferences(rows, tokenizer, max_length=10**6, on_bad_row="skip")
        assert report == {}
        assert len(dataset) == len(rows) > 190
        spanned = 0
        for row, ids in zip(rows, dataset, strict=True):
            prompt = encode_prompt(tokenizer, row.prompt)
            for answer in (ids["chosen_ids"], ids["rejected_ids"]):
                spanned += (
                    answer[: len(prompt)] != prompt
                )  # a token spans the end of the prompt: "Crocodile" + "sorted"
                assert answer[len(prompt) :].count(2) == 1
                assert answer[-1] == 2
        assert spanned <= 2

    def test_sgd_dialogues_train_every_assistant_turn(self, tmp_path):
        tokenizer = chatml()
        path = tmp_path / "dialogues.jsonl"
        with gzip.open(SHARED / "sgd-dialogues" / "dialogues.jsonl.gz", "rt") as lines:
            dialogues = [line for _, line in zip(range(50), lines, strict=False)]
        path.write_text("".join(dialogues))
        settings = DataSettings(train_dataset=[DataSource(path=str(path))], seed=42)
        rows = load_rows(settings, Demonstration).train
        assert len(rows) == 50
        for row, line in zip(rows, dialogues, strict=True):
            messages = json.loads(line)["messages"]
            said = [message["content"] + "<|im_end|>" for message in messages if message["role"] == "assistant"]
            assert learnt(tokenizer, row, max_length=10**6) == said
