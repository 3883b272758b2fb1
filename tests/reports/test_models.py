"""Public reports of models that were loaded, trained or saved as something else than what they are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaForSequenceClassification,
    OPTConfig,
    OPTForCausalLM,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
)

from align.cli.architectures.cases import write_small_model
from align.cli.check import check
from align.config.reward import RewardRecipe
from align.config.sft import SFTRecipe
from align.engine.engine import AdapterOff
from align.engine.torch_engine import TorchEngine
from align.errors import UserError
from align.models.check_files import check_embeddings, check_files
from align.models.forward import label_loss, response_logprobs, response_values
from align.models.load import load_config, load_policy
from align.models.packing import check_packing
from align.models.scalar_head import find_reward_head, start_reward_model
from align.models.tokenizer import load_tokenizer
from align.models.trainable import add_adapter
from align.models.value import find_value_head, load_value_model
from align.ppo.setup import start_value_head
from align.reward.inputs import check_reward_inputs
from align.sft.train import run
from reward_models import load_reward_model, score_sequences
from tests.ppo.runs import ALONE
from tests.worlds import letter_tokenizer, metrics, save_recipe, save_tiny_policy, tiny_llama, training_keys

SIZES = {"vocab_size": 29, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "pad_token_id": 0,
         "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}{{ m.role[:1] }}{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}a{% endif %}"
)
# Of a Llama 2, as it was published: greedy, with settings of sampling beside it.
LLAMA2 = {
    "bos_token_id": 1,
    "eos_token_id": 2,
    "do_sample": False,
    "temperature": 0.9,
    "top_p": 0.6,
    "max_length": 4096,
}


def change(file: Path, **keys) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **keys}))


@pytest.fixture(scope="module")
def tuned(tmp_path_factory) -> Path:
    """`base` and what SFT made of it in `out`: tied weights in bfloat16, without padding, two templates, Llama 2's settings."""
    folder = tmp_path_factory.mktemp("tuned")
    torch.manual_seed(0)
    model = tiny_llama(layers=1)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.to(torch.bfloat16).save_pretrained(folder / "base")
    change(folder / "base/config.json", pad_token_id=-1)
    (folder / "base/generation_config.json").write_text(json.dumps(LLAMA2))
    tokenizer = letter_tokenizer(pad_is_eos=True)
    tokenizer.chat_template = {"default": TEMPLATE, "tool_use": "t{{ tools | length }}" + TEMPLATE}
    tokenizer.padding_side = "right"
    tokenizer.save_pretrained(folder / "base")
    rows = [{"messages": [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "cd"}]}] * 4
    run(SFTRecipe(**training_keys("sft", folder, rows, []), max_steps=2, gradient_checkpointing=True))
    return folder


def test_the_model_cannot_be_saved_after_training(tuned):
    """https://github.com/huggingface/transformers/issues/29988, https://github.com/hiyouga/LlamaFactory/issues/2837: Llama 2's
    and Vicuna's generation configs are refused once a Trainer has put a token id into them. What they say is kept."""
    assert json.loads((tuned / "out/generation_config.json").read_text()).items() >= LLAMA2.items()


def test_a_padding_id_that_is_no_token(tuned):
    """https://github.com/hiyouga/LlamaFactory/issues/1206: Llama 2's pad_token_id of -1, "Padding_idx must be within"."""
    assert json.loads((tuned / "out/config.json").read_text())["pad_token_id"] == 2


def test_the_template_is_a_set_of_templates(tuned):
    """https://github.com/EleutherAI/lm-evaluation-harness/issues/1962: Mixtral has one for tools; 'dict' has no 'encode'."""
    tokenizers = [AutoTokenizer.from_pretrained(tuned / name) for name in ("base", "out")]
    assert tokenizers[0].chat_template == tokenizers[1].chat_template
    assert set(tokenizers[1].chat_template) == {"default", "tool_use"}


def test_the_tuned_model_generates_slowly(tuned):
    """https://github.com/turbo-llm/turbo-alignment/issues/47: gradient checkpointing leaves `use_cache: false` in the config."""
    assert json.loads((tuned / "out/config.json").read_text())["use_cache"] is True


def test_the_tuned_model_is_twice_as_large(tuned):
    """https://github.com/lm-sys/FastChat/issues/2977: weights in bfloat16 are saved in float32."""
    assert {weight.dtype for weight in load_file(tuned / "out/model.safetensors").values()} == {torch.bfloat16}


def test_tied_weights_cannot_be_saved(tuned):
    """https://github.com/unslothai/unsloth/issues/1105: they share memory; saved once, they are tied again when loaded."""
    assert "lm_head.weight" not in load_file(tuned / "out/model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(tuned / "out")
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert not torch.equal(model.lm_head.weight, AutoModelForCausalLM.from_pretrained(tuned / "base").lm_head.weight)


@pytest.mark.parametrize("settings", [{"num_return_sequences": 2}, {"max_new_tokens": -1}])
def test_a_generation_config_that_transformers_refuses(tmp_path, settings):
    """https://github.com/huggingface/transformers/issues/25388: a traceback of validation, which names no file."""
    letter_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=rf"generation_config.json: {next(iter(settings))}: transformers refuses it"):
        load_tokenizer(str(tmp_path))


# -- Architectures


def test_packed_examples_attend_to_each_other():
    """https://github.com/huggingface/transformers/pull/46634: OPT makes its mask without the positions; its loss still falls."""
    config = OPTConfig(**SIZES, ffn_dim=32, word_embed_proj_dim=32, max_position_embeddings=512)
    with pytest.raises(UserError, match="does not keep them apart"):
        check_packing(config, "packing", trust_remote_code=False)


def test_a_model_that_reads_images_too(tmp_path, capsys):
    """https://github.com/huggingface/trl/issues/5213: SFT of Qwen3.5 as it is published; its text model is what is trained."""
    torch.manual_seed(0)
    text = {**SIZES, "vocab_size": 40, "num_hidden_layers": 2, "num_key_value_heads": 1, "head_dim": 8, "intermediate_size": 16,
            "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 1, "linear_num_value_heads": 2,
            "linear_key_head_dim": 8, "linear_value_head_dim": 8}  # fmt: skip
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
    config = Qwen3_5Config(text_config=text, vision_config={**vision, "deepstack_visual_indexes": []})
    Qwen3_5ForConditionalGeneration(config).save_pretrained(tmp_path / "base")
    letter_tokenizer().save_pretrained(tmp_path / "base")
    rows = [{"prompt": "ab", "completion": "c"}] * 4
    settings = SFTRecipe(**training_keys("sft", tmp_path, rows, []), max_steps=1)
    assert check.run(str(save_recipe(settings, tmp_path / "sft.yaml"))) == 0
    run(settings)
    assert "the text model alone is loaded, trained and saved" in " ".join(capsys.readouterr().err.split())
    ids = torch.tensor([[3, 4, 5, 2]])
    base, tuned = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("base", "out"))
    loss = base(input_ids=ids, labels=torch.tensor([[-100, -100, 5, 2]])).loss
    assert metrics(settings)[0]["train/loss"] == pytest.approx(float(loss.detach()), abs=1e-5)
    assert not torch.equal(tuned.lm_head.weight, base.lm_head.weight)
    assert tuned(input_ids=ids, labels=ids).loss < base(input_ids=ids, labels=ids).loss


def test_a_model_of_images_that_is_taken_for_something_else(tmp_path):
    """https://github.com/UKGovernmentBEIS/inspect_ai/issues/4438, https://github.com/Liuziyu77/Visual-RFT/issues/83: Mistral 3
    and Qwen2-VL have no causal model of their type."""
    for kind in ("mistral3", "qwen2_vl"):
        AutoConfig.for_model(kind).save_pretrained(tmp_path / kind)
        with pytest.raises(UserError, match=rf"is a model of text and images \({kind}\)"):
            load_config(str(tmp_path / kind), "model_name_or_path")
    for kind in ("gemma3", "qwen3_5", "bert", "llama"):
        AutoConfig.for_model(kind).save_pretrained(tmp_path / kind)
        load_config(str(tmp_path / kind), "model_name_or_path")


def test_a_head_after_which_logits_are_scaled():
    """https://github.com/unslothai/unsloth/pull/11277: a fused loss of Granite or Cohere that leaves out the scale."""
    torch.manual_seed(0)
    config = GraniteConfig(
        **SIZES, num_key_value_heads=1, intermediate_size=32, logits_scaling=0.25, initializer_range=0.2
    )
    model = GraniteForCausalLM(config).eval()
    ids = torch.arange(3, 13)[None]
    labels = ids.clone()
    labels[:, :4] = -100
    expected = model(input_ids=ids, labels=labels).loss
    torch.testing.assert_close(label_loss(model, ids, labels, 1 / 6)[0], expected)


def test_transformers_has_no_token_classifier(tmp_path):
    """https://github.com/hiyouga/LlamaFactory/issues/7468, https://github.com/nebuly-ai/optimate/issues/281: values of OPT."""
    torch.manual_seed(0)
    OPTForCausalLM(OPTConfig(**SIZES, ffn_dim=32, word_embed_proj_dim=32)).save_pretrained(tmp_path)
    head = find_value_head(str(tmp_path), AutoConfig.from_pretrained(tmp_path), "value_model_path")
    model, missing = load_value_model(str(tmp_path), head)
    start_value_head(model, missing)
    ids = torch.tensor([[3, 4, 5, 6]])
    states = model.base_model(input_ids=ids).last_hidden_state[0, 1:3]
    torch.nn.init.normal_(model.score.weight)
    values = response_values(model, ids, torch.ones_like(ids, dtype=torch.bool), 2)
    torch.testing.assert_close(values, (states @ model.score.weight[0])[None])


@pytest.mark.parametrize("name", ["score.weight", "reward_head.weight", "v_head.summary.weight"])
def test_a_reward_model_gets_a_random_head(tmp_path, name):
    """https://github.com/OpenRLHF/OpenRLHF/issues/428, https://github.com/hiyouga/LlamaFactory/issues/4379: its head has
    another name, or is drawn again all the same."""
    weight = torch.randn(1, 32, generator=torch.Generator().manual_seed(3))
    save_tiny_policy(tmp_path, layers=1)
    file = tmp_path / "model.safetensors"
    save_file({**load_file(file), name: weight}, file, {"format": "pt"})
    head = find_reward_head(str(tmp_path), AutoConfig.from_pretrained(tmp_path), new_head=False)
    assert torch.equal(start_reward_model(str(tmp_path), head, new_head=False, seed=0).score.weight, weight)


def test_the_head_of_an_adapter_has_another_shape(tmp_path):
    """https://github.com/shibing624/MedicalGPT/issues/271: an adapter of a reward model, on a base that gets two labels by default."""
    save_tiny_policy(tmp_path / "base", layers=1)
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=1)
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], task_type="SEQ_CLS")).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    letter_tokenizer().save_pretrained(tmp_path / "adapter")
    recipe = RewardRecipe(output_dir="out", train_dataset=[], model_name_or_path=str(tmp_path / "adapter"))
    inputs = check_reward_inputs(recipe)
    started = start_reward_model(str(tmp_path / "adapter"), inputs.head, new_head=False, seed=0)
    assert torch.equal(started.score.weight, adapted.get_base_model().score.weight)


def test_a_reward_model_is_taken_for_a_classifier_of_two_labels(tmp_path):
    """https://github.com/OpenRLHF/OpenRLHF/issues/1039: its config.json does not say how many labels; two are the default."""
    weight = torch.randn(1, 32, generator=torch.Generator().manual_seed(3))
    save_tiny_policy(tmp_path, layers=1)
    file = tmp_path / "model.safetensors"
    save_file({**load_file(file), "score.weight": weight}, file, {"format": "pt"})
    change(tmp_path / "config.json", architectures=["LlamaForSequenceClassification"])
    assert AutoConfig.from_pretrained(tmp_path).num_labels == 2
    assert torch.equal(load_reward_model(str(tmp_path)).score.weight, weight)


def test_the_score_is_read_at_the_first_end_of_turn():
    """https://github.com/huggingface/transformers/issues/35352: padding is EOS, which every turn of the prompt ends with."""
    torch.manual_seed(0)
    config = tiny_llama(layers=1).config
    config.update({"num_labels": 1, "pad_token_id": 2})
    model = LlamaForSequenceClassification(config).eval()
    ids = torch.tensor([[3, 4, 2, 5, 6, 2], [3, 4, 2, 7, 2, 2]])  # the last is padding
    mask = torch.tensor([[True] * 6, [True] * 5 + [False]])
    with torch.no_grad():
        states = model.model(input_ids=ids).last_hidden_state
        expected = torch.stack([states[0, 5], states[1, 4]]) @ model.score.weight[0]
        torch.testing.assert_close(score_sequences(model, ids, mask), expected)


def test_a_model_that_starts_as_an_adapter_has_its_base_as_reference(tmp_path):
    """https://github.com/huggingface/trl/issues/495, https://github.com/huggingface/trl/issues/536: with the adapter off, KL
    is measured from the model before SFT."""
    base = tiny_llama(layers=1)
    base.save_pretrained(tmp_path / "base")
    adapted = get_peft_model(base, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    adapted.save_pretrained(str(tmp_path / "sft"))
    ids = torch.arange(3, 9)[None]
    recipe = SFTRecipe(output_dir="out", train_dataset=[], method="lora", lora_r=2)
    policy = TorchEngine(add_adapter(load_policy(str(tmp_path / "sft")), recipe), recipe, ALONE, 1e-3)
    for name, weight in policy.module.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    with torch.no_grad():
        expected = adapted.eval()(input_ids=ids).logits
        torch.testing.assert_close(AdapterOff(policy)(input_ids=ids).logits, expected, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(policy(input_ids=ids).logits, expected, atol=1e-2)


def test_log_probabilities_of_bfloat16_have_three_digits():
    """https://github.com/huggingface/transformers/issues/31267: a softmax in bfloat16 moves ratio and KL away from 1 and 0."""
    model = tiny_llama(layers=1).to(torch.bfloat16)
    ids, mask = torch.arange(3, 13)[None], torch.ones(1, 10, dtype=torch.bool)
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, 4:-1].float()
        found = response_logprobs(model, ids, mask, 5, 1.0)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found[0], logits.log_softmax(-1).gather(1, ids[0, 5:, None])[:, 0], atol=1e-5, rtol=0)


# -- Files that do not fit together


def test_a_layer_that_the_file_lacks_is_drawn_at_random(tmp_path):
    """https://github.com/h2oai/h2o-llmstudio/issues/83: "newly initialized" after a merge, and training goes on."""
    save_tiny_policy(tmp_path, layers=1)
    file = tmp_path / "model.safetensors"
    save_file(
        {name: each for name, each in load_file(file).items() if name != "lm_head.weight"}, file, {"format": "pt"}
    )
    with pytest.raises(UserError, match=r"LlamaForCausalLM lack lm_head\.weight"):
        check_files(AutoModelForCausalLM, str(tmp_path), "model_name_or_path", AutoConfig.from_pretrained(tmp_path))


def test_more_tokens_than_embeddings():
    """https://github.com/OpenRLHF/OpenRLHF/issues/87, https://github.com/huggingface/transformers/issues/4875: an IndexError,
    or an assert on the device, in the first step; a vocabulary that is padded is right."""
    tokenizer, config = letter_tokenizer(), tiny_llama(layers=1).config
    config.vocab_size = 32
    check_embeddings(tokenizer, config, "base", "model_name_or_path")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<a>", "<b>", "<c>", "<d>"]})
    with pytest.raises(UserError, match="the tokenizer has 33 tokens, and the model 32 embeddings"):
        check_embeddings(tokenizer, config, "base", "model_name_or_path")


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"method": "lora", "lora_target_modules": ["lm_head"]}, "'lm_head' belongs to the head"),
        ({"method": "lora", "lora_target_modules": ["wte"]}, "'wte' is also the head"),
        ({"method": "head"}, "the model's head is its embedding"),
    ],
)
def test_a_tied_head_is_merged_away_or_trained_unasked(tmp_path, keys, said):
    """https://github.com/huggingface/transformers/issues/45127, https://github.com/huggingface/transformers/issues/11903,
    https://github.com/hiyouga/LlamaFactory/issues/6749."""
    config = GPT2Config(n_embd=8, n_layer=1, n_head=2, n_positions=32, vocab_size=29)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    recipe = SFTRecipe(output_dir="out", train_dataset=[], **keys)
    with pytest.raises(UserError, match=said):
        check_files(AutoModelForCausalLM, str(tmp_path), "model_name_or_path", config, trained_by=recipe)


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_an_adapter_of_a_tied_head_changes_the_embedding_too(tmp_path, target):
    """https://github.com/huggingface/peft/issues/2018: both are one weight, to which PEFT adds the update; here each gets a weight of its own."""
    base = tiny_llama(layers=1)
    base.config.tie_word_embeddings = True
    base.tie_weights()
    base.save_pretrained(tmp_path / "base")
    base.config._name_or_path = base.name_or_path = str(tmp_path / "base")
    torch.manual_seed(1)
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", target], init_lora_weights=False)).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    ids = torch.tensor([[1, 5, 6, 7, 8]])
    with torch.no_grad():
        expected = adapted(input_ids=ids).logits
        merged = load_policy(str(tmp_path / "adapter"))
        torch.testing.assert_close(merged(input_ids=ids).logits, expected)
        merged.save_pretrained(tmp_path / "merged")
        saved = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        torch.testing.assert_close(saved(input_ids=ids).logits, expected)


@pytest.mark.parametrize(
    ("name", "method", "told"), [("qwen3_moe", "lora", True), ("qwen3_moe", "full", False), ("llama", "lora", False)]
)
def test_no_expert_gets_an_adapter(tmp_path, capsys, name, method, told):
    """https://github.com/NVIDIA-NeMo/Automodel/issues/1151, https://github.com/unslothai/unsloth/pull/6936: transformers 5
    stores all experts in one tensor, which "all linear layers" leaves frozen without a word."""
    write_small_model(name, tmp_path)
    recipe = SFTRecipe(output_dir="out", train_dataset=[], method=method)
    config = AutoConfig.from_pretrained(tmp_path)
    check_files(AutoModelForCausalLM, str(tmp_path), "model_name_or_path", config, trained_by=recipe)
    assert (f"experts of {tmp_path} get no adapter" in capsys.readouterr().err) == told
