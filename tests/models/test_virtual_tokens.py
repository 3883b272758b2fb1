"""`align evaluate` on folders of virtual tokens, against PEFT on each row alone; the stages, which refuse them."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from transformers import AutoConfig

import align.generation.responses
from align.__main__ import main
from align.data.collate import pad_left
from align.errors import UserError
from align.evaluate.compare import run
from align.evaluate.inputs import prepare_inputs
from align.generation.decoder import decoder
from align.models.packing import example_rows
from align.models.small_model import small_model
from align.models.virtual_tokens import VirtualTokenModel
from align.sft.inputs import load_config_and_tokenizer
from tests.evaluate.test_compare import ROWS, judged, predictions, recipe, rows, values
from tests.sft.letter_rows import ROWS as TRAINED
from tests.sft.letter_rows import recipe as sft_recipe
from tests.worlds import LETTERS, letter_ids, letter_tokenizer, save_tiny_policy, tiny_llama, write_jsonl

TOKENS = 5
KINDS = {
    "prompt": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=TOKENS),
    "prefix": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=TOKENS),
    "p-tuning": PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=TOKENS, encoder_hidden_size=8),
}


def virtual_tokens(folder: Path, kind: str) -> str:
    """Virtual tokens for the model `base` that change much of what it says."""
    base = save_tiny_policy(folder / "base")
    model = tiny_llama()
    model.config._name_or_path = model.name_or_path = base
    adapted = get_peft_model(model, copy.copy(KINDS[kind]))
    torch.manual_seed(7)
    for weight in adapted.prompt_encoder.parameters():
        torch.nn.init.normal_(weight)
    adapted.save_pretrained(folder / kind)
    letter_tokenizer().save_pretrained(folder / kind)
    return str(folder / kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_they_do_what_they_do_in_peft_under_padding_too(tmp_path, monkeypatch, kind, batch_size):
    model = AutoPeftModelForCausalLM.from_pretrained(virtual_tokens(tmp_path, kind)).eval()

    def alone(input_ids):  # PEFT gives prompt tuning logits of the virtual tokens too
        output = model(input_ids=input_ids)
        output.logits = output.logits[:, -input_ids.shape[1] :]
        return output

    padded = []
    original = align.generation.responses.generate

    def generate(model, ids, mask, *rest):
        padded.append(not bool(mask.all()))
        return original(model, ids, mask, *rest, batch_size=2)  # the third row takes the place of one that has ended

    monkeypatch.setattr(align.generation.responses, "generate", generate)
    models = {"base": str(tmp_path / "base"), "virtual": str(tmp_path / kind)}
    settings = recipe(tmp_path, models=models, metrics=["perplexity", "token_accuracy", "exact_match"],
                      per_device_eval_batch_size=batch_size)  # fmt: skip
    results = run(settings)
    assert any(padded) == (batch_size > 1)

    nll, right, count = map(sum, zip(*(judged(alone, *row) for row in ROWS), strict=True))
    assert values(results, "perplexity")["virtual", 0] == pytest.approx(math.exp(nll / count), rel=1e-5)
    assert values(results, "token_accuracy")["virtual", 0] == pytest.approx(right / count)
    assert abs(values(results, "perplexity")["base", 0] - math.exp(nll / count)) > 1
    written = {}
    for prompt, _ in ROWS:
        ids: list[int] = []  # PEFT 0.21's `generate` disagrees with its `forward` since transformers 5.24
        with torch.no_grad():
            while len(ids) < 6 and 2 not in ids:
                ids.append(int(alone(torch.tensor([[*letter_ids(prompt), *ids]])).logits[0, -1].argmax()))
        written[prompt] = letter_tokenizer().decode(ids, skip_special_tokens=True)
    lines = predictions(tmp_path)
    assert {line["prompt"]: line["prediction"] for line in lines if line["model"] == "virtual"} == written
    assert {line["prompt"]: line["prediction"] for line in lines if line["model"] == "base"} != written


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
@pytest.mark.parametrize("name", ["mistral", "gemma3_text"])
def test_no_padding_takes_their_place_in_a_sliding_window(name, kind):
    """Of 4 tokens, in rows of 3 and 9 with 5 virtual tokens, as PEFT reads each row alone."""
    adapted = get_peft_model(small_model(AutoConfig.for_model(name, sliding_window=8), 64), copy.copy(KINDS[kind]))
    torch.nn.init.normal_(adapted.prompt_encoder["default"].embedding.weight)
    rows = example_rows((3, 9), 64)
    decoding = decoder(VirtualTokenModel(adapted).eval(), 3)
    with torch.no_grad():
        logits = decoding.admit(*pad_left(rows, 0), [3, 9])
        for _ in range(3):
            expected = torch.stack([adapted(input_ids=torch.tensor([row])).logits[0, -1] for row in rows])
            torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
            tokens = expected.argmax(dim=-1)
            decoding.append(tokens)
            logits = decoding.logits()
            rows = [[*row, token] for row, token in zip(rows, tokens.tolist(), strict=True)]


def test_they_take_room_in_the_model(tmp_path):
    folder = virtual_tokens(tmp_path, "prompt")
    longest = 256 - TOKENS  # positions of the model
    prompt = (LETTERS * 10)[: longest - 3]
    fits = recipe(tmp_path, evaluation=rows([(prompt, "ab")]), models={"m": folder})
    assert len(prepare_inputs(fits, generates=False).rows) == 1
    with pytest.raises(UserError, match=f"longer than {longest} tokens"):
        prepare_inputs(recipe(tmp_path, evaluation=rows([(prompt, "abc")]), models={"m": folder}), generates=False)


def test_what_the_sft_stage_leaves_is_evaluated(tmp_path):
    from align.sft.train import run as train

    settings = sft_recipe(tmp_path, method="prompt", eval_rows=ROWS, num_virtual_tokens=3, num_train_epochs=4)
    trained = train(settings)
    results = run(recipe(tmp_path / "judged", models={"base": str(tmp_path / "base"), "tuned": settings.output_dir}))
    found = values(results, "perplexity")
    assert found["tuned", 0] == pytest.approx(trained.metrics["eval_perplexity"], rel=1e-4)
    assert abs(found["tuned", 0] - found["base", 0]) > 0.1, "with its tokens, not the model alone"
    base, tuned = results.costs
    assert (base.trained_parameters, base.train_tokens, base.training_seconds) == (None, None, None)
    assert tuned.trained_parameters == 3 * 32  # by the hidden size
    lengths = [len(prompt) + len(completion) + 1 for prompt, completion in TRAINED if prompt not in dict(ROWS)]
    assert tuned.train_tokens == 4 * (sum(lengths) + lengths[0])  # a copy of the first row fills the batch of 4
    assert tuned.training_seconds is not None
    assert (base.prompt_tokens, tuned.prompt_tokens) == (asked := sum(len(prompt) for prompt, _ in ROWS) / 7, 3 + asked)


def test_other_kinds_are_refused(tmp_path):
    folder = Path(virtual_tokens(tmp_path, "prompt"))
    file = folder / "adapter_config.json"
    for key, value in (("task_type", "SEQ_CLS"), ("peft_type", "MULTITASK_PROMPT_TUNING")):
        kept = json.loads(file.read_text())
        file.write_text(json.dumps(kept | {key: value}))
        with pytest.raises(UserError, match=f"expected virtual tokens of type.* got .*{value}"):
            run(recipe(tmp_path, models={"m": str(folder)}))
        file.write_text(json.dumps(kept))
    file.write_text(json.dumps(kept | {"base_model_name_or_path": str(tmp_path / "gone")}))
    with pytest.raises(UserError, match=r"models.m: .*prompt is an adapter of .*gone: no model at"):
        run(recipe(tmp_path, models={"m": str(folder)}))


@pytest.mark.parametrize(
    ("stage", "keys"),
    [
        ("sft", "model_name_or_path: {virtual}"),
        ("reward", "model_name_or_path: {virtual}"),
        ("reward", "model_name_or_path: {base}\nsft_model_path: {virtual}"),
        ("ppo", "sft_model_path: {virtual}\nreward_model_path: {base}"),
        ("ppo", "sft_model_path: {base}\nreward_model_path: {virtual}"),
        ("ppo", "sft_model_path: {base}\nreward_funcs: [len]\nvalue_model_path: {virtual}"),
        ("classify", "model_name_or_path: {virtual}"),
    ],
)
def test_no_stage_starts_from_them(tmp_path, capsys, monkeypatch, stage, keys):
    folders = {"virtual": virtual_tokens(tmp_path, "prefix"), "base": str(tmp_path / "base")}
    data = write_jsonl(tmp_path / "d.jsonl", [
        {"prompt": p, "chosen": c, "rejected": "a", **({"text": p, "label": c} if stage == "classify" else {})}
        if stage != "sft" else {"prompt": p, "completion": c} for p, c in ROWS
    ])  # fmt: skip
    if stage == "classify":
        data = write_jsonl(tmp_path / "d.jsonl", [{"text": p, "label": len(p) % 2} for p, _ in ROWS])
    text = keys.format(**folders).replace("[len]", "[tests.models.test_virtual_tokens:zero]")
    path = tmp_path / "recipe.yaml"
    path.write_text(f"stage: {stage}\noutput_dir: {tmp_path / 'o'}\ntrain_dataset: {data}\nresponse_length: 4\n{text}\n"
                    .replace("response_length: 4\n", "response_length: 4\n" if stage == "ppo" else ""))  # fmt: skip
    for command in ("check", stage):
        assert main([command, str(path)]) == 2
        said = capsys.readouterr()
        said = " ".join((said.out + said.err).split())
        assert "holds virtual tokens, which" in said, (command, said)
        assert "no stage can start from them" in said


def zero(completions, **_):
    return [0.0] * len(completions)


def test_a_model_with_a_recurrent_state_takes_none(tmp_path):
    """Which of its layers keeps one is known from its configuration."""
    AutoConfig.for_model("lfm2", num_hidden_layers=2, layer_types=["conv", "full_attention"]).save_pretrained(tmp_path)
    letter_tokenizer().save_pretrained(tmp_path)
    for method in ("prompt", "prefix"):
        settings = dataclasses.replace(sft_recipe(tmp_path / "sft", method=method), model_name_or_path=str(tmp_path))
        with pytest.raises(UserError, match=rf"method: {method}: .* \(lfm2\): virtual tokens need .* method: lora"):
            load_config_and_tokenizer(str(tmp_path), settings)
    settings = {"peft_type": "PREFIX_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 3}
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": str(tmp_path)}))
    with pytest.raises(UserError, match=r"models: .* \(lfm2\): virtual tokens need"):
        prepare_inputs(recipe(tmp_path / "evaluate", models={"soft": str(adapter)}), generates=True)
