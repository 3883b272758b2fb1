"""Garbage in the small JSON files of a model folder: one error that names file and key, or a tokenizer that works."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig

from align.errors import UserError
from align.models.inspect_folder import inspect_folder
from align.models.small_files import RULES
from align.models.tokenizer import load_tokenizer, model_end_ids
from tests.worlds import save_tiny_policy

GARBAGE: list[Any] = ["x", -1, 10**30, [], {}, [[{"a": [1]}]], {"a": {"b": [None]}}]
KEY = "model_name_or_path"


@pytest.fixture
def model(tmp_path, monkeypatch, shared_folder) -> Path:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(shared_folder("model with small files", lambda at: save_tiny_policy(at, layers=1)), "model")
    return Path("model")


def put(file: Path, **changes: Any) -> str:
    """Change keys of a JSON file; returns what it held."""
    before = file.read_text() if file.is_file() else "{}"
    file.write_text(json.dumps({**json.loads(before), **changes}))
    return before


def use(name: str) -> str | None:
    """What is wrong with the model's file of this name; None if what it says can be loaded, used and saved."""
    try:
        inspect_folder("model", KEY)
        if name != "generation_config.json":
            load_tokenizer("model").save_pretrained("saved")
        assert all(0 <= end < 2**31 for end in model_end_ids("model"))  # all that is read of the generation config
    except UserError as error:
        return str(error)
    return None


@pytest.mark.parametrize("name", RULES)
def test_garbage_under_every_known_key(model, name):
    """What the rules let through is loaded and saved; transformers refuses little of it, and that by file and key too."""
    for key in RULES[name]:
        for value in GARBAGE:
            before = put(model / name, **{key: value})
            said = use(name)
            assert said is None or (f"model/{name}: " in said and "\n" not in said), (key, value, said)
            assert said is None or name == "tokenizer.json" or key in said, (key, value, said)
            (model / name).write_text(before)


def test_transformers_knows_no_key_without_a_rule():
    """But for what is read by name in `generate` alone, and is no business of ours."""
    unread = {"continuous_batching_config", "dola_layers", "speculation_type", "constraints"}
    assert set(GenerationConfig().to_dict()) - set(RULES["generation_config.json"]) <= unread


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("generation_config.json", {"eos_token_id": -5}, "eos_token_id: expected a token id or a list of token ids, got -5"),
        ("generation_config.json", {"eos_token_id": 10**30}, "eos_token_id: expected a token id"),
        ("generation_config.json", {"eos_token_id": [2, -1]}, "eos_token_id: expected a token id"),
        ("generation_config.json", {"watermarking_config": "x"}, 'watermarking_config: expected a mapping, got "x"'),
        ("generation_config.json", {"watermarking_config": {"a": 1}}, "watermarking_config: transformers refuses it"),
        ("generation_config.json", {"pad_token_id": "x"}, 'pad_token_id: expected a token id, got "x"'),
        ("generation_config.json", {"temperature": "hot"}, 'temperature: expected a number, got "hot"'),
        ("config.json", {"eos_token_id": "x"}, "eos_token_id: expected a token id"),
        ("tokenizer_config.json", {"model_max_length": "x"}, 'model_max_length: expected a number above 0, got "x"'),
        ("tokenizer_config.json", {"chat_template": {"default": 5}}, "chat_template: expected text, or templates by name"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"-1": {"content": "x"}}}, "added_tokens_decoder: expected"),
        ("special_tokens_map.json", {"eos_token": 5}, "eos_token: expected text, or a mapping with the text `content`, got 5"),
        ("added_tokens.json", {"zz": None}, "zz: expected a token id, got nothing"),
        ("tokenizer.json", {"model": 5}, "model: expected a JSON object, got 5"),
        ("tokenizer.json", {"model": {"type": "x"}}, "model/tokenizer.json: the tokenizer cannot be loaded"),
    ],
)  # fmt: skip
def test_what_is_said(model, name, changes, said):
    put(model / name, **changes)
    with pytest.raises(UserError) as error:  # noqa: PT012 - the files are read in two places
        inspect_folder("model", KEY)
        load_tokenizer("model")
    assert said in str(error.value)
    assert f"model/{name}: " in str(error.value)


def test_values_that_people_have(model):
    """transformers' number for "no limit", -1 for a token that is not there, and null everywhere, for one."""
    put(
        model / "tokenizer_config.json",
        model_max_length=1000000000000000019884624838656,
        eos_token={"__type": "AddedToken", "content": "</s>"},
    )
    put(model / "generation_config.json", eos_token_id=[2, 3], pad_token_id=-1, temperature=1, early_stopping="never")
    inspect_folder("model", KEY)
    assert load_tokenizer("model").eos_token_id == 2
    put(model / "generation_config.json", **dict.fromkeys(RULES["generation_config.json"]))
    inspect_folder("model", KEY)
    load_tokenizer("model")


def test_what_is_saved_does_not_tell_how_it_was_loaded(model, monkeypatch):
    saved = []
    for offline in (False, True):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
        load_tokenizer("model").save_pretrained("saved")
        saved.append(Path("saved/tokenizer_config.json").read_text())
    assert saved[0] == saved[1]


def test_no_vocabulary(model):
    (model / "tokenizer.json").unlink()
    with pytest.raises(
        UserError, match=r"^model: has no tokenizer; copy tokenizer.json, tokenizer_config.json and their"
    ):
        load_tokenizer("model")
