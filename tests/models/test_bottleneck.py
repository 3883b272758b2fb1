"""`method: bottleneck`: where the blocks are, what they compute, what of a run is saved, and what later stages make of it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    T5ForConditionalGeneration,
    T5ForSequenceClassification,
)

from align.__main__ import main
from align.config.load import load_recipe
from align.encoders import classify, mlm
from align.errors import UserError
from align.models.bottleneck import bottleneck_config, continue_adapter
from align.models.load import load_config, load_masked_lm, load_policy
from align.models.small_model import small_config
from align.models.sublayers import find_sublayers
from align.ppo import train as ppo
from align.reward import train as reward
from align.sft import train as sft
from reward_models.bottleneck import after_block, insert_bottlenecks
from reward_models.load import load_reward_model
from tests.encoders import test_classify, test_mlm
from tests.models.test_trainable import HELD_OUT, SETTINGS, held_out_loss
from tests.ppo.test_train import make_recipe
from tests.reward import test_train as test_reward
from tests.sft.letter_rows import recipe
from tests.worlds import letter_ids, save_tiny_pair_model, tiny_llama, write_jsonl

BOTTLENECK = {"method": "bottleneck", "bottleneck_size": 4}
# model type: its sub-layers' outputs, of each kind of layer
SUBLAYERS = {
    "bert": [["encoder.layer.0.attention.output.dense", "encoder.layer.0.output.dense"]],
    "distilbert": [["transformer.layer.0.attention.out_lin", "transformer.layer.0.ffn.lin2"]],
    "albert": [["encoder.albert_layer_groups.0.albert_layers.0.attention.dense", "encoder.albert_layer_groups.0.albert_layers.0.ffn_output"]],
    "modernbert": [["layers.0.attn.Wo", "layers.0.mlp.Wo"]],
    "llama": [["layers.0.self_attn.o_proj", "layers.0.mlp.down_proj"]],
    "gpt2": [["h.0.attn.c_proj", "h.0.mlp.c_proj"]],
    "opt": [["decoder.layers.0.self_attn.out_proj", "decoder.layers.0.fc2"]],
    "phi": [["layers.0.self_attn.dense", "layers.0.mlp.fc2"]],  # both beside each other
    "falcon": [["h.0.self_attention.dense", "h.0.mlp.dense_4h_to_h"]],  # added in place
    "cohere2": [["layers.0.self_attn.o_proj", "layers.0.mlp.down_proj"]],
    "granite": [["layers.0.self_attn.o_proj", "layers.0.mlp.down_proj"]],  # scaled before they are added
    "gemma2": [["layers.0.post_attention_layernorm", "layers.0.post_feedforward_layernorm"]],
    "mixtral": [["layers.0.self_attn.o_proj", "layers.0.mlp.experts"]],
    "rwkv": [["blocks.0.attention.output", "blocks.0.feed_forward"]],
    "t5": [["encoder.block.0.layer.0.SelfAttention.o", "encoder.block.0.layer.1.DenseReluDense.wo"],
           ["decoder.block.0.layer.0.SelfAttention.o", "decoder.block.0.layer.1.EncDecAttention.o", "decoder.block.0.layer.2.DenseReluDense.wo"]],
}  # fmt: skip


def config_of(kind: str):
    from transformers import CONFIG_MAPPING

    return small_config(CONFIG_MAPPING[kind](), 64)


@pytest.mark.parametrize("kind", SUBLAYERS)
def test_sublayers_are_found_in_every_layer(kind):
    found = find_sublayers(config_of(kind), "method")
    firsts = [layer for layer in found if re.match(r"\D*\.0\.", layer[0])]
    assert firsts == SUBLAYERS[kind]
    others = [[re.sub(r"\.\d+\.", ".0.", name, count=1) for name in layer] for layer in found if layer not in firsts]
    assert all(layer in firsts for layer in others)
    assert others or kind == "albert"  # whose layers are one


@pytest.mark.parametrize("kind", ["llama", "falcon", "gemma2", "mixtral", "bert", "gpt2"])
@pytest.mark.parametrize("placement", ["houlsby", "pfeiffer"])
def test_it_starts_as_the_base_to_the_bit_and_trains_its_blocks_alone(kind, placement):
    torch.manual_seed(0)
    auto = AutoModelForMaskedLM if kind == "bert" else AutoModelForCausalLM
    model = auto.from_config(config_of(kind)).eval()
    ids = torch.arange(4, 16).reshape(2, 6)
    with torch.no_grad():
        before = model(input_ids=ids).logits
        adapter = bottleneck_config(model.config, size=4, placement=placement, task_type="FEATURE_EXTRACTION")
        adapted = get_peft_model(model, adapter)
        assert torch.equal(adapted(input_ids=ids).logits, before)
        trained = {name: weight for name, weight in adapted.named_parameters() if weight.requires_grad}
        outputs = [name for layer in SUBLAYERS[kind] for name in (layer if placement == "houlsby" else layer[-1:])]
        firsts = {each for name in trained for each in outputs if f"{each}.bottleneck_" in name}
        assert firsts == set(outputs)
        assert not any(
            f"{layer[0]}.bottleneck_" in name
            for name in trained
            for layer in SUBLAYERS[kind]
            if placement == "pfeiffer"
        )
        blocks = model.config.num_hidden_layers * (2 if placement == "houlsby" else 1)
        assert sum(map(torch.numel, trained.values())) == blocks * (64 * 4 + 4 + 4 * 64 + 64)
        for weight in trained.values():
            weight.add_(0.1)
        assert not torch.equal(adapted(input_ids=ids).logits, before)
        with adapted.disable_adapter():
            assert torch.equal(adapted(input_ids=ids).logits, before)


def test_a_block_by_hand():
    down, up = nn.Linear(2, 1), nn.Linear(1, 2)
    down.weight.data, down.bias.data = torch.tensor([[1.0, -2.0]]), torch.tensor([0.5])
    up.weight.data, up.bias.data = torch.tensor([[3.0], [-1.0]]), torch.tensor([0.25, 0.0])
    states = torch.tensor([[2.0, 1.0], [1.0, 2.0]])  # W_down h + b_down: 0.5 and -2.5
    expected = torch.tensor([[2 + 3 * 0.5 + 0.25, 1 - 0.5], [1 + 0.25, 2.0]])
    torch.testing.assert_close(after_block(states, down, up), expected)
    output, rest = after_block((states, "weights"), down, up)
    torch.testing.assert_close(output, expected)
    assert rest == "weights"


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("mamba", "type mamba: 1 sub-layer in some of its layers"),
        ("longformer", "type longformer: no sub-layers in some"),
        ("esm", "type esm: its layers could not be found on a small random model"),
    ],
)
def test_models_whose_layers_are_not_found_are_refused(kind, words):
    from transformers import CONFIG_MAPPING

    with pytest.raises(UserError, match=rf"^method: bottleneck does not fit models of {words}.*use method: lora"):
        find_sublayers(CONFIG_MAPPING[kind](num_hidden_layers=2), "method")


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """An SFT run with adapters, and its results."""
    settings = recipe(tmp_path_factory.mktemp("sft"), **SETTINGS, **BOTTLENECK)
    return settings, sft.run(settings)


class TestSFT:
    def test_what_is_trained_saved_and_loaded(self, tuned):
        settings, results = tuned
        out = Path(settings.output_dir)
        assert results.metrics["eval_loss"] < results.metrics["eval_loss_before"] - 0.5
        assert results.trained_parameters == 2 * 2 * (32 * 4 + 4 + 4 * 32 + 32)
        assert not (out / "model.safetensors").exists()
        weights = load_file(out / "adapter_model.safetensors")
        assert sum(map(torch.numel, weights.values())) == results.trained_parameters
        loaded = load_policy(str(out)).eval()
        assert held_out_loss(loaded) == pytest.approx(results.metrics["eval_loss"], abs=1e-5)
        base = tiny_llama().state_dict()
        for name, weight in loaded.state_dict().items():
            plain = name.replace(".base_layer", "")
            assert "bottleneck" in name or torch.equal(weight, base[plain]), name
        ids = torch.tensor([letter_ids("abcdef")])
        by_peft = PeftModel.from_pretrained(tiny_llama(), str(out)).eval()
        assert torch.equal(by_peft(input_ids=ids).logits, loaded(input_ids=ids).logits)
        assert load_config(str(out), "model").to_dict() == load_config(settings.model_name_or_path, "model").to_dict()

    def test_the_card_loads_it(self, tuned):
        card = (Path(tuned[0].output_dir) / "README.md").read_text()
        names: dict = {}
        exec(card.split("```python\n")[1].split("```")[0], names)
        assert held_out_loss(names["model"]) == pytest.approx(tuned[1].metrics["eval_loss"], abs=1e-5)

    def test_training_goes_on_where_it_ended(self, tuned, tmp_path):
        start = tuned[0].output_dir
        changes = {**SETTINGS, "learning_rate": 3e-3, **BOTTLENECK, "model_name_or_path": start}
        again = recipe(tmp_path, **changes)
        results = sft.run(again)
        assert results.metrics["eval_loss_before"] == pytest.approx(tuned[1].metrics["eval_loss"], abs=1e-6)
        settings = json.loads((Path(again.output_dir) / "adapter_config.json").read_text())
        assert settings["base_model_name_or_path"] == tuned[0].model_name_or_path
        for other, words in (
            ({"method": "lora"}, "is a bottleneck adapter, which cannot be merged into a model, so method: lora"),
            ({"bottleneck_size": 8}, "bottleneck_size: expected 4, as that of the adapter in"),
            ({"bottleneck_placement": "pfeiffer"}, "bottleneck_placement: expected houlsby"),
        ):
            with pytest.raises(UserError, match=words):
                sft.run(recipe(tmp_path, **{**changes, **other, "output_dir": str(tmp_path / "refused")}))

    def test_the_best_is_the_start_where_nothing_is_better(self, tuned, tmp_path):
        start = tuned[0].output_dir
        best = {
            "load_best_model_at_end": True,
            "eval_steps": 3,
            "learning_rate": 10.0,
            "model_name_or_path": start,
            "metric_for_best_model": "train_loss",
        }
        settings = recipe(tmp_path, **{**SETTINGS, **best}, **BOTTLENECK)
        sft.run(settings)
        before, after = (load_file(Path(each) / "adapter_model.safetensors") for each in (start, settings.output_dir))
        assert all(torch.equal(before[name], after[name]) for name in before.keys() | after.keys())

    def test_merge_says_why_not(self, tuned, tmp_path, capsys):
        assert main(["merge", tuned[0].output_dir, str(tmp_path / "merged")]) == 2
        assert "a bottleneck adapter cannot be merged: it is not linear" in capsys.readouterr().err
        assert not (tmp_path / "merged").exists()

    def test_it_is_evaluated(self, tuned, tmp_path):
        rows = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": a, "completion": b} for a, b in HELD_OUT])
        (tmp_path / "e.yaml").write_text(
            f"stage: evaluate\noutput_dir: {tmp_path}/e\nmodels: {{a: {tuned[0].output_dir}}}\neval_dataset: {rows}\n"
            "metrics: [perplexity]\n"
        )
        assert main(["evaluate", str(tmp_path / "e.yaml")]) == 0
        value = json.loads((tmp_path / "e" / "results.json").read_text())
        assert f"{tuned[1].metrics['eval_perplexity']:.4f}"[:-1] in json.dumps(value)

    def test_a_damaged_file_is_named(self, tuned, tmp_path):
        folder = shutil.copytree(tuned[0].output_dir, tmp_path / "copy")
        file = folder / "adapter_config.json"
        settings = json.loads(file.read_text())
        for wrong in (None, {"id2label": [1]}, {"id2label": {"x": "y"}}):
            file.write_text(json.dumps({**settings, "model_config": wrong}))
            with pytest.raises(UserError, match=r"adapter_config\.json: model_config: expected an object"):
                load_config(str(folder), "model")
        file.write_text(json.dumps(settings))
        weights = load_file(folder / "adapter_model.safetensors")
        for name in (next(iter(weights)), "base_model.model.model.layers.1.mlp.down_proj.bottleneck_up.bias"):
            save_file(
                {each: weight for each, weight in weights.items() if each != name}, folder / "adapter_model.safetensors"
            )
            with pytest.raises(UserError, match="cannot load the adapter"):
                load_policy(str(folder))


class TestPPO:
    def test_vllm_is_refused(self, tmp_path):
        changes = {**BOTTLENECK, "rollout_engine": "vllm", "vllm_python": "python"}
        with pytest.raises(UserError, match="rollout_engine: vllm runs plain models"):
            load_recipe("ppo", make_recipe(tmp_path, **changes))

    @pytest.mark.slow
    def test_from_a_plain_model_the_reference_is_the_policy_with_its_adapters_off(self, tmp_path):
        changes = {**BOTTLENECK, "total_episodes": 32, "advantage_estimator": "rloo", "num_generations": 2}
        ppo.run(load_recipe("ppo", make_recipe(tmp_path, **changes)))
        rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
        kls = [row["objective/kl"] for row in rows if "objective/kl" in row]
        assert kls[0] == 0.0 != kls[1]
        assert not (tmp_path / "out" / "model.safetensors").exists()
        assert load_policy(str(tmp_path / "out"))

    def test_from_an_adapter_the_reference_is_a_copy_with_it(self, tuned, tmp_path):
        changes = {**BOTTLENECK, "total_episodes": 32, "advantage_estimator": "rloo", "num_generations": 2}
        path = make_recipe(tmp_path, sft_model_path=tuned[0].output_dir, **changes)
        ppo.run(load_recipe("ppo", path))
        rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
        kls = [row["objective/kl"] for row in rows if "objective/kl" in row]
        assert kls[0] == 0.0 != kls[1]
        before, after = (
            load_file(Path(each) / "adapter_model.safetensors") for each in (tuned[0].output_dir, tmp_path / "out")
        )
        assert before.keys() == after.keys()
        changes = {"sft_model_path": tuned[0].output_dir, **BOTTLENECK, "output_dir": str(tmp_path / "gae")}
        with pytest.raises(
            UserError, match=r"sft_model_path: .* is a bottleneck adapter, from which no value model can start"
        ):
            ppo.run(load_recipe("ppo", make_recipe(tmp_path, **changes)))


def test_a_reward_model_scores_with_its_adapters(tmp_path):
    settings = test_reward.recipe(tmp_path, eval_rows=test_reward.ROWS[:3], num_train_epochs=6, **BOTTLENECK)
    results = reward.run(settings)
    model = load_reward_model(settings.output_dir)
    assert model.config.score_mean != 0.0
    manifest = json.loads((Path(settings.output_dir) / "stage.json").read_text())
    assert manifest["score_mean"] == model.config.score_mean
    (chosen, rejected) = (
        [test_reward.score(model, row[0], row[place]) for row in test_reward.ROWS[:3]] for place in (1, 2)
    )
    losses = [-torch.nn.functional.logsigmoid(a - b) for a, b in zip(chosen, rejected, strict=True)]
    assert float(torch.stack(losses).mean()) == pytest.approx(results.metrics["eval_loss"], abs=1e-5)
    changes = {"reward_model_path": settings.output_dir, "advantage_estimator": "rloo", "num_generations": 2}
    changes["output_dir"] = str(tmp_path / "ppo")
    path = make_recipe(
        tmp_path, sft_model_path=settings.model_name_or_path, reward_funcs=[], total_episodes=16, **changes
    )
    ppo.run(load_recipe("ppo", path))


def test_a_t5_is_loaded_with_its_adapters(tmp_path):
    """It reads a weight of the projection that a block comes after."""
    base, folder = save_tiny_pair_model(tmp_path / "base"), tmp_path / "adapter"
    model, loaded = (T5ForConditionalGeneration.from_pretrained(base).eval() for _ in range(2))
    ids = {"input_ids": torch.tensor([[3, 4, 5, 2]]), "decoder_input_ids": torch.tensor([[0, 6, 7]])}
    with torch.no_grad():
        before = model(**ids).logits
        adapter = bottleneck_config(model.config, size=4, placement="houlsby", task_type="FEATURE_EXTRACTION")
        adapted = get_peft_model(model, adapter).eval()
        for weight in (each for each in adapted.parameters() if each.requires_grad):
            weight.add_(0.1)
        expected = adapted(**ids).logits
        adapted.save_pretrained(str(folder))
        settings = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps({**settings, "model_config": {}}))
        insert_bottlenecks(loaded, str(folder))
        torch.testing.assert_close(loaded(**ids).logits, expected)
    assert not torch.allclose(before, expected)


def test_a_t5s_classifier_goes_on_from_its_adapters(tmp_path):
    """The layers of the one have a prefix that those of the other lack."""
    base, folder = save_tiny_pair_model(tmp_path / "base"), tmp_path / "adapter"
    model = T5ForConditionalGeneration.from_pretrained(base)
    adapted = get_peft_model(
        model, bottleneck_config(model.config, size=4, placement="houlsby", task_type="FEATURE_EXTRACTION")
    )
    with torch.no_grad():
        for weight in (each for each in adapted.parameters() if each.requires_grad):
            weight.normal_()
    adapted.save_pretrained(str(folder))
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**settings, "model_config": {}}))
    classifier = T5ForSequenceClassification.from_pretrained(base, num_labels=2)
    theirs = bottleneck_config(classifier.config, size=4, placement="houlsby", task_type="FEATURE_EXTRACTION")
    going_on = get_peft_model(T5ForSequenceClassification.from_pretrained(base, num_labels=2), theirs)
    continue_adapter(going_on, str(folder))
    insert_bottlenecks(classifier, str(folder))
    blocks = {name: each for name, each in adapted.named_parameters() if each.requires_grad}
    mine = {
        name.replace("transformer.", "", 1): each for name, each in going_on.named_parameters() if each.requires_grad
    }
    assert mine.keys() == blocks.keys()
    assert all(torch.equal(mine[name], blocks[name]) for name in blocks)
    ids = torch.tensor([[3, 4, 5, 2]])
    heads = [each for each in (going_on.get_base_model(), classifier)]
    heads[1].classification_head.load_state_dict(heads[0].classification_head.state_dict())
    with torch.no_grad():
        ours, loaded = (each.eval()(input_ids=ids).logits for each in heads)
    torch.testing.assert_close(ours, loaded)


class TestEncoders:
    @pytest.fixture(scope="class")
    def pretrained(self, tmp_path_factory):
        settings = test_mlm.recipe(tmp_path_factory.mktemp("mlm"), eval_texts=test_mlm.HELD_OUT, **BOTTLENECK)
        return settings, mlm.run(settings)

    def test_masked_language_modeling(self, pretrained):
        settings, results = pretrained
        model = load_masked_lm(settings.output_dir)
        pieces = test_mlm.drawn(settings, test_mlm.HELD_OUT, "evaluation")
        total, _, count = test_mlm.sums(model, pieces)
        assert float(total) / count == pytest.approx(results.metrics["eval_loss"], abs=1e-5)
        assert results.metrics["eval_loss"] != results.metrics["eval_loss_before"]

    def test_a_classifier_goes_on_with_the_adapters_of_masked_language_modeling(self, pretrained, tmp_path):
        start = pretrained[0].output_dir
        rows = [("abc", "x"), ("xyz", "y"), ("bca", "x"), ("zzy", "y")]
        held_out = [("cab", "x"), ("yyx", "y")]
        settings = test_classify.recipe(tmp_path, rows, held_out, model_name_or_path=start, **BOTTLENECK)
        results = classify.run(settings)
        card = (Path(settings.output_dir) / "README.md").read_text()
        names: dict = {"text": "abc"}
        exec(card.split("```python\n")[1].split("```")[0], names)
        model = names["model"]
        assert model.config.id2label == {0: "x", 1: "y"}
        tokenizer = AutoTokenizer.from_pretrained(settings.output_dir)
        losses = [
            -model(**tokenizer(text, return_tensors="pt")).logits[0].log_softmax(-1)["xy".index(label)]
            for text, label in held_out
        ]
        assert float(torch.stack(losses).mean()) == pytest.approx(results.metrics["eval_loss"], abs=1e-5)
        first = test_classify.recipe(
            tmp_path,
            rows,
            held_out,
            model_name_or_path=start,
            **BOTTLENECK,
            learning_rate=1e-12,
            output_dir=str(tmp_path / "1"),
        )
        classify.run(first)
        ours, theirs = (load_file(Path(each) / "adapter_model.safetensors") for each in (first.output_dir, start))
        for name, weight in theirs.items():
            torch.testing.assert_close(ours[name], weight, atol=1e-9, rtol=0)
