"""Every token that the model names ends a response: read, trained, and no part of the text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig

from align.data.collate import pad_left
from align.data.end_tokens import decode_responses, end_ids, set_model_ends
from align.data.rows import Demonstration
from align.data.tokenize import tokenize_demonstrations
from align.data.turn_end import turn_end_note
from align.errors import BadRow, UserError
from align.generation.ending import Ending
from align.generation.generate import generate
from align.generation.sampling import uniforms
from align.models.save import save_weights
from align.models.tokenizer import keep_ends, load_tokenizer
from tests.data.messages import assistant, encode_response, user
from tests.data.test_tokenize import make_tokenizer
from tests.worlds import letter_tokenizer, tiny_llama

# As of Phi-3.5: the turn ends by one token, and the dialogue by the tokenizer's EOS.
PHI = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
EOS = 2
SPECIAL = ["<pad>", "</s>", "<|end|>", "<|user|>", "<|assistant|>"]


def phi(folder: Path, eos: object = (2, 4, 1), template: str = PHI):
    tokenizer = make_tokenizer(SPECIAL, template, pad_token="<pad>", eos_token="</s>")
    tokenizer.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    return load_tokenizer(str(folder))


@pytest.mark.parametrize(
    ("generation", "config", "ids"),
    [
        ([5, 2, 7], None, (2, 5, 7)),  # Llama-3.1, Gemma-3, Qwen3: a list; the tokenizer's EOS is 2
        (7, None, (2, 7)),
        (None, None, (2,)),  # a generation config without one
        ("absent", [6, 2], (2, 6)),  # no generation config
        (7, [6, 2], (2, 7)),  # the generation config counts, as for transformers
        ([9999], None, (2, 9999)),  # no such token: nothing samples it
    ],
)
def test_the_ids_that_end_a_response(tmp_path, generation, config, ids):
    letter_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": config}))
    if generation != "absent":
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    assert end_ids(load_tokenizer(str(tmp_path))) == ids


def test_an_adapter_ends_as_its_base_does(tmp_path):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    phi(base)
    letter_tokenizer().save_pretrained(adapter)
    settings = {"peft_type": "LORA", "base_model_name_or_path": str(base)}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    assert end_ids(load_tokenizer(str(adapter))) == (2, 4, 1)


@pytest.mark.parametrize("bad", ["</s>", [2, None], [[2]], 2.0, True])
def test_an_eos_that_is_no_id_is_refused(tmp_path, bad):
    with pytest.raises(UserError, match=r"eos_token_id: expected a token id or a list of token ids"):
        phi(tmp_path, bad)


class TestTrainedEnd:
    def test_the_template_writes_one_of_the_set(self, tmp_path):
        tokenizer = phi(tmp_path)
        ids = encode_response(tokenizer, [user("the cat")], [assistant("sat")])
        assert tokenizer.decode(ids) == "sat<|end|>"

    def test_the_model_does_not_end_by_what_the_template_writes(self, tmp_path):
        tokenizer = phi(tmp_path, eos=1)
        ids = encode_response(tokenizer, [user("the cat")], [assistant("sat")])
        assert tokenizer.decode(ids) == "sat<|end|>\n</s>"

    def test_the_template_writes_none(self, tmp_path):
        tokenizer = phi(tmp_path, template=PHI.replace("<|end|>", "").replace("{{ eos_token }}", ""))
        assert tokenizer.decode(encode_response(tokenizer, [user("the cat")], [assistant("sat")])) == "sat\n</s>"

    def test_plain_text_ends_by_what_it_ends_with(self, tmp_path):
        tokenizer = phi(tmp_path)
        for text, trained in (("sat", "sat</s>"), ("sat<|end|>\n", "sat<|end|>"), ("a<|end|>b", "a<|end|>b</s>")):
            assert tokenizer.decode(encode_response(tokenizer, "the cat", text)) == trained

    @pytest.mark.parametrize("end", ["</s>", "<|end|>"])
    def test_an_end_inside_a_message_is_a_bad_row(self, tmp_path, end):
        with pytest.raises(BadRow, match="special token"):
            encode_response(phi(tmp_path), [user("the cat")], [assistant(f"sat {end} on")])


# As a base model gets it: the turn ends by a token that the model does not name, or by text that is no token at all.
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}" + (
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("special", [True, False])
def test_a_turn_ends_by_the_token_that_the_template_ends_it_with(tmp_path, special):
    tokenizer = make_tokenizer(["<pad>", "</s>"], CHATML, pad_token="<pad>", eos_token="</s>")
    tokenizer.add_tokens(["<|im_end|>"], special_tokens=special)
    tokenizer.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end_ids(tokenizer) == (1, end)
    assert encode_response(tokenizer, [user("one")], [assistant("I")]) == [*tokenizer("I")["input_ids"], end]
    assert turn_end_note(tokenizer) is None
    model = keep_ends(tiny_llama(), tokenizer)
    model.save_pretrained(tmp_path)
    assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == [1, end]


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (CHATML, "ends a turn with '<|im_end|>\\n', which is no end token"),
        (CHATML.replace("<|im_end|>", "</s>"), ""),
        (
            CHATML.replace("<|im_end|>", ""),
            r"no end after a turn: </s> is added to a row's last response, behind the '\n'",
        ),
        (CHATML.replace("<|im_end|>\n", ""), "no end after a turn: </s> is added to a row's last response. "),
        (CHATML.replace("<|im_end|>\n", "").replace("<|im_start|>", "</s>"), ""),  # the next turn opens with it
        ("{{ raise_exception('no') }}", ""),
    ],
)
def test_a_turn_that_the_template_ends_by_text_is_said_once(tmp_path, capsys, template, said):
    make_tokenizer(["<pad>", "</s>"], template, pad_token="<pad>", eos_token="</s>").save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    assert end_ids(tokenizer) == (1,)
    row = Demonstration([user("one")], [assistant("I")], "f:1")
    for _ in range(2):
        if "raise" not in template:
            tokenize_demonstrations([row], tokenizer, max_length=999)
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: the chat template")]
    assert len(notes) == bool(said)
    assert all(said in note for note in notes)


def test_the_token_that_ended_is_no_text(tmp_path):
    """Whether it is special or not: here <|end|> is ordinary."""
    tokenizer = make_tokenizer(SPECIAL[:2], pad_token="<pad>", eos_token="</s>")
    (end,) = tokenizer("!", add_special_tokens=False)["input_ids"]
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [end]}))
    loaded = load_tokenizer(str(tmp_path))
    cat = loaded("the!cat", add_special_tokens=False)["input_ids"]
    assert decode_responses(loaded, [[*cat, end], [*cat, 1], cat, [end], []]) == ["the!cat"] * 3 + [""] * 2


@torch.no_grad()
def test_stop_strings_end_a_response_where_transformers_ends_it():
    """After the token that completes one, whatever comes before it; the tokens of these letters are single characters."""
    model, tokenizer, prompts = tiny_llama(spread=0.3), letter_tokenizer(), [[1, 5, 6], [1, 9], [1, 28, 3, 4, 20]]
    free = model.generate(torch.tensor([prompts[2]]), max_new_tokens=9, do_sample=False, eos_token_id=EOS)
    word = tokenizer.decode(free[0, 8:11])  # of the third row's response, three letters from its fourth on
    ids, mask = pad_left(prompts, 0)
    ending = Ending(tokenizer, [word, "nowhere"])
    responses, real, _ = generate(model, ids, mask, torch.zeros(3, 9), 0.0, ending)
    ended = ending.ended(responses, real.sum(1))
    for row, prompt in enumerate(prompts):
        plain = model.generate(
            torch.tensor([prompt]), max_new_tokens=9, do_sample=False, eos_token_id=EOS, tokenizer=tokenizer,
            stop_strings=[word, "nowhere"],
        )[0, len(prompt) :].tolist()  # fmt: skip
        assert responses[row, real[row]].tolist() == plain
        assert ended[row] == (word in tokenizer.decode(plain) or EOS in plain)
    assert int(real[2].sum()) == 6
    assert ended[2]


def test_a_stop_string_across_tokens_and_inside_one():
    tokenizer = make_tokenizer(SPECIAL[:2], pad_token="<pad>", eos_token="</s>")

    def ended(text, stop):
        ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
        return bool(Ending(tokenizer, [stop]).ended(ids, torch.tensor([ids.shape[1]])))

    for text, stop, expected in (
        ("the cat\n\n", "\n\n", True),
        ("the cat\n", "\n\n", False),
        ("the cat sat", "at sa", True),
        ("the cat", "at", True),
        ("the caf\u00e9", "\u00e9", True),  # two tokens of a byte each
        ("the cat</s>", "</s>", True),
    ):
        assert ended(text, stop) == expected, (text, stop)


def test_noise_is_spent_alike_whatever_ends_a_response():
    """A second end token cuts responses, and changes none of the tokens before."""
    model, tokenizer = tiny_llama(spread=0.3), letter_tokenizer()
    ids, mask = pad_left([[1, 5, 6, 7], [1, 9], [1, 3, 4]] * 4, 0)
    noise = uniforms(0, "test", range(12), 12)
    whole, whole_real, _ = generate(model, ids, mask, noise, 1.0, Ending(tokenizer))
    set_model_ends(tokenizer, [7, 11, 20])
    cut, real, _ = generate(model, ids, mask, noise, 1.0, Ending(tokenizer))
    for row in range(12):
        before = whole[row, whole_real[row]].tolist()
        stop = next((i + 1 for i, token in enumerate(before) if token in (2, 7, 11, 20)), len(before))
        assert cut[row, real[row]].tolist() == before[:stop]


def test_a_merged_adapter_keeps_the_end_tokens(tmp_path):
    model = tiny_llama(layers=1)
    model.generation_config.eos_token_id = [9, EOS]
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    save_weights(adapted, adapted.state_dict(), tmp_path)
    letter_tokenizer().save_pretrained(tmp_path)
    assert end_ids(load_tokenizer(str(tmp_path))) == (EOS, 9)
