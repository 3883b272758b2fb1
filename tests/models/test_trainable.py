"""What `method` trains, in the stages that fine-tune: which weights move, what is saved, what a later stage loads."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from align.__main__ import main
from align.config.load import load_recipe
from align.config.method import OF_METHOD, check_method
from align.config.stages import STAGES
from align.errors import UserError
from align.models.trainable import parameter_counts
from align.sft.train import run
from tests import ranks
from tests.models.trainable_worker import train_each
from tests.sft.letter_rows import ROWS, nll, recipe
from tests.worlds import deepspeed_file, letter_ids, metrics, save_recipe, save_tiny_policy, tiny_llama, trained

HELD_OUT = [("ac", "d"), ("e", "fghijkl")]
PROJECTIONS = {name for name in tiny_llama().state_dict() if name.endswith("_proj.weight")}
EVERYTHING = set(tiny_llama().state_dict())
LAST_LAYER = {name for name in EVERYTHING if name.startswith("model.layers.1.")}

# method: what moves, of the plain model that is saved
MOVES = {
    "full": ({}, EVERYTHING),
    "freeze layers": ({"method": "freeze", "freeze_layers": 1}, LAST_LAYER | {"model.norm.weight", "lm_head.weight"}),
    "freeze pattern": (
        {"method": "freeze", "trainable_pattern": r"layers\.0\..*(q|k)_proj"},
        {"model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.k_proj.weight"},
    ),
    "head": ({"method": "head"}, {"lm_head.weight"}),
    "lora": ({"method": "lora", "lora_r": 2}, PROJECTIONS),
    "lora on embeddings": (
        {"method": "lora", "lora_r": 2, "lora_target_modules": ["embed_tokens"]},
        {"model.embed_tokens.weight"},
    ),
    "dora": ({"method": "dora", "lora_r": 2}, PROJECTIONS),
    "ia3": ({"method": "ia3"}, {name for name in PROJECTIONS if name.split(".")[-2] in ("k_proj", "v_proj", "down_proj")}),
}  # fmt: skip
SETTINGS = {"eval_rows": HELD_OUT, "num_train_epochs": 4, "learning_rate": 3e-2, "save_steps": 3}


def held_out_loss(model) -> float:
    with torch.no_grad():
        total, count = nll(model, HELD_OUT)
    return float(total / count)


@pytest.mark.parametrize("name", MOVES)
def test_what_moves_and_what_is_saved(tmp_path, name):
    changes, moves = MOVES[name]
    settings = recipe(tmp_path, **SETTINGS, **changes)
    results = run(settings)
    base = tiny_llama().state_dict()
    assert {key for key, weight in trained(settings).items() if not torch.equal(weight, base[key])} == moves
    losses = [row["train/loss"] for row in metrics(settings) if "train/loss" in row]
    assert losses[-1] < losses[0]
    plain = AutoModelForCausalLM.from_pretrained(settings.output_dir)
    assert held_out_loss(plain) == pytest.approx(results.metrics["eval_loss"], abs=1e-4)
    adapter = Path(settings.output_dir) / "adapter"
    assert adapter.exists() == name.startswith(("lora", "dora", "ia3"))
    if adapter.exists():
        assert not list(adapter.glob("*.bin"))
        with_adapter = AutoPeftModelForCausalLM.from_pretrained(adapter)
        assert held_out_loss(with_adapter) == pytest.approx(results.metrics["eval_loss"], abs=1e-5)


class TestQLoRA:
    """Low-rank updates beside 4-bit weights: `pip install align[qlora]`."""

    def test_merged_into_the_weights_as_they_were_before_rounding(self, tmp_path):
        pytest.importorskip("bitsandbytes")
        settings = recipe(tmp_path, **SETTINGS, method="qlora", lora_r=2)
        results = run(settings)
        base, merged = tiny_llama().state_dict(), trained(settings)
        adapter = load_file(Path(settings.output_dir) / "adapter" / "adapter_model.safetensors")
        assert {name for name in base if not torch.equal(merged[name], base[name])} == PROJECTIONS
        for name in PROJECTIONS:
            a, b = (adapter[f"base_model.model.{name.removesuffix('weight')}lora_{ab}.weight"].float() for ab in "AB")
            torch.testing.assert_close(merged[name], base[name] + 32 / 2 * b @ a, atol=1e-5, rtol=0)
        plain = AutoModelForCausalLM.from_pretrained(settings.output_dir)
        assert plain.dtype == torch.float32
        assert not hasattr(plain.config, "quantization_config")
        # The adapter trained in float32: TRL alone would have it in bfloat16.
        assert all(not torch.equal(weight, weight.bfloat16().float()) for weight in adapter.values())
        # What was trained and evaluated had rounded weights.
        assert 1e-4 < abs(held_out_loss(plain) - results.metrics["eval_loss"]) < 0.5
        assert abs(held_out_loss(tiny_llama()) - results.metrics["eval_loss_before"]) > 1e-2
        assert results.metrics["eval_loss"] < results.metrics["eval_loss_before"] - 0.5

    def test_evaluation_leaves_training_as_it_is(self, tmp_path):
        """bitsandbytes has a kernel for evaluation on some CPUs, which layers never leave again, without a gradient."""
        pytest.importorskip("bitsandbytes")
        save_tiny_policy(tmp_path / "base", hidden_size=64)  # the kernel's sizes
        adapters = []
        for rows in (None, HELD_OUT):
            out = tmp_path / f"out{len(adapters)}"
            changes = {"eval_rows": rows, "eval_steps": 1 if rows else None, "output_dir": str(out)}
            run(recipe(tmp_path, **changes, method="qlora", lora_r=2, num_train_epochs=2))
            adapters.append(load_file(out / "adapter" / "adapter_model.safetensors"))
        for name, weight in adapters[0].items():
            torch.testing.assert_close(adapters[1][name], weight, atol=1e-6, rtol=0)

    def test_an_adapter_is_not_merged_into_rounded_weights(self, tmp_path):
        pytest.importorskip("bitsandbytes")
        first = recipe(tmp_path, method="lora")
        run(first)
        again = recipe(tmp_path, method="qlora", model_name_or_path=f"{first.output_dir}/adapter",
                       output_dir=str(tmp_path / "again"))  # fmt: skip
        with pytest.raises(UserError, match="cannot be merged into the 4-bit weights"):
            run(again)

    def test_without_bitsandbytes(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "bitsandbytes", None)
        with pytest.raises(UserError, match=r"pip install -e '\.\[qlora\]'"):
            run(recipe(tmp_path, method="qlora"))


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_virtual_tokens_leave_the_model_alone(tmp_path, method):
    settings = recipe(tmp_path, **SETTINGS, method=method, num_virtual_tokens=4)
    results = run(settings)
    out = Path(settings.output_dir)
    assert results.metrics["eval_loss"] < results.metrics["eval_loss_before"]
    assert not (out / "model.safetensors").exists()
    assert (
        sum(weight.numel() for weight in load_file(out / "adapter_model.safetensors").values())
        == {
            "prompt": 4 * 32,
            "prefix": 4 * 2 * 2 * 16,  # a key and a value, of two heads of 8, in each of two layers
        }[method]
    )
    size = sum(weight.numel() for weight in tiny_llama().parameters())
    assert parameter_counts(tiny_llama()) == (size, size)
    model = AutoPeftModelForCausalLM.from_pretrained(out)
    assert results.trained_parameters == {"prompt": 4 * 32, "prefix": 4 * 2 * 2 * 16}[method]
    assert AutoTokenizer.from_pretrained(out).eos_token_id == 2
    total, count = 0.0, 0
    for prompt, completion in HELD_OUT:
        ids = torch.tensor([[ord(c) - ord("a") + 3 for c in prompt + completion] + [2]])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, -ids.shape[1] :]
        log_p = logits[len(prompt) - 1 : -1].log_softmax(-1)
        total -= float(log_p.gather(1, ids[0, len(prompt) :, None]).sum())
        count += len(completion) + 1
    assert results.metrics["eval_loss"] == pytest.approx(total / count, abs=1e-4)


def test_a_soft_prompt_starts_from_embeddings(tmp_path):
    settings = recipe(tmp_path, **{**SETTINGS, "learning_rate": 1e-9}, method="prompt", num_virtual_tokens=4)
    run(settings)
    prompt = load_file(Path(settings.output_dir) / "adapter_model.safetensors")["prompt_embeddings"]
    model = AutoModelForCausalLM.from_pretrained(settings.model_name_or_path)
    assert torch.cdist(prompt, model.get_input_embeddings().weight).min(dim=1).values.max() < 1e-5


def test_a_later_stage_starts_from_the_adapter_or_from_what_it_was_merged_into(tmp_path):
    first = recipe(tmp_path, **SETTINGS, method="lora")
    run(first)
    losses = []
    for start in (first.output_dir, f"{first.output_dir}/adapter"):
        again = recipe(tmp_path, **SETTINGS, model_name_or_path=start, output_dir=str(tmp_path / f"again{len(losses)}"))
        losses.append(run(again).metrics["eval_loss_before"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


QLORA = ["qlora"] if importlib.util.find_spec("bitsandbytes") else []


@pytest.mark.parametrize("method", ["prompt", "prefix"])
@pytest.mark.parametrize(
    "changes", [{}, {"completion_only_loss": False}, {"loss_normalization": "example_mean"}, {"label_smoothing_factor": 0.3}]
)  # fmt: skip
def test_the_loss_with_virtual_tokens_before_it_is_that_of_each_row_alone(tmp_path, method, changes):
    """Also where a row's own first token could be predicted, from the virtual ones: it is not counted."""
    settings = recipe(
        tmp_path, method=method, num_virtual_tokens=3, train_batch_size=8, max_steps=1, learning_rate=1e-9, **changes
    )
    run(settings)
    tuned = AutoPeftModelForCausalLM.from_pretrained(settings.output_dir).eval()
    rows = []
    for prompt, completion in ROWS:
        ids = torch.tensor([letter_ids(prompt) + letter_ids(completion) + [2]])
        first = len(prompt) if settings.completion_only_loss else 1
        chances = tuned(input_ids=ids).logits[0, -ids.shape[1] :][first - 1 : -1].log_softmax(dim=-1)
        hard, smooth = -chances.gather(1, ids[0, first:, None])[:, 0], -chances.mean(dim=-1)
        share = settings.label_smoothing_factor
        rows.append((1 - share) * hard + share * smooth)
    expected = torch.stack([row.mean() for row in rows]) if "loss_normalization" in changes else torch.cat(rows)
    assert metrics(settings)[0]["train/loss"] == pytest.approx(float(expected.mean()), abs=1e-5)


@pytest.mark.parametrize(
    ("stage", "names"), [(2, [*MOVES, "prompt", "prefix", "bottleneck", *QLORA]), (3, ["full", "lora", "bottleneck"])]
)
def test_two_ranks_do_what_one_does(tmp_path, stage, names):
    ways = {
        **{name: changes for name, (changes, _) in MOVES.items()},
        "prompt": {"method": "prompt"},
        "prefix": {"method": "prefix", "prefix_projection": True},
        "bottleneck": {"method": "bottleneck", "gradient_checkpointing": True},
        "qlora": {"method": "qlora"},
    }
    alone, together = {}, {}
    for name in names:
        folder = tmp_path / name.replace(" ", "_")
        settings = recipe(tmp_path, eval_rows=HELD_OUT, **ways[name], learning_rate=1e-3, adam_epsilon=1e-3,
                          output_dir=str(folder / "alone"))  # fmt: skip
        run(settings)
        alone[name] = settings
        together[name] = dataclasses.replace(
            settings, output_dir=str(folder / "together"), deepspeed=deepspeed_file(tmp_path / "ds.json", stage)
        )
        save_recipe(together[name], tmp_path / f"{folder.name}.yaml")
    done = ranks.run(train_each, *map(str, sorted(tmp_path.glob("*.yaml"))), log=tmp_path / "rank")
    assert done.returncode == 0, done.stderr[-3000:]
    for name in names:
        file = "adapter_model.safetensors" if name in ("prompt", "prefix", "bottleneck") else "model.safetensors"
        ours, theirs = (load_file(Path(each[name].output_dir) / file) for each in (alone, together))
        assert ours.keys() == theirs.keys()
        for key in ours:
            torch.testing.assert_close(ours[key], theirs[key], atol=1e-4, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


class TestMerge:
    def test_it_is_the_model_that_the_stage_merged(self, tmp_path, capsys):
        settings = recipe(tmp_path, **SETTINGS, method="lora")
        run(settings)
        assert main(["merge", f"{settings.output_dir}/adapter", str(tmp_path / "merged")]) == 0
        assert "merged into" in capsys.readouterr().out
        merged = load_file(tmp_path / "merged" / "model.safetensors")
        for name, weight in trained(settings).items():
            torch.testing.assert_close(merged[name], weight, atol=1e-6, rtol=0)
        assert AutoTokenizer.from_pretrained(tmp_path / "merged").eos_token_id == 2
        assert main(["merge", f"{settings.output_dir}/adapter", str(tmp_path / "merged")]) == 2
        assert "exists already" in capsys.readouterr().err

    def test_what_cannot_be_merged(self, tmp_path, capsys):
        settings = recipe(tmp_path, **SETTINGS, method="prompt")
        run(settings)
        assert main(["merge", settings.output_dir, str(tmp_path / "merged")]) == 2
        assert "virtual tokens, which cannot be merged" in capsys.readouterr().err
        assert main(["merge", str(tmp_path), str(tmp_path / "merged")]) == 2
        assert "no adapter (adapter_config.json is missing)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ("method: freeze", "freeze needs either freeze_layers or trainable_pattern, got neither"),
        ("method: freeze\nfreeze_layers: 1\ntrainable_pattern: x", "got both"),
        ("freeze_layers: 1", "freeze_layers: is for method: freeze, got method: full"),
        ("method: freeze\ntrainable_pattern: '('", "trainable_pattern: not a regular expression"),
        ("method: prompt\npacking: true", "prepends virtual tokens to each row"),
        ("method: adapter", "method: adapter is called bottleneck here"),
        ("method: pfeiffer", "method: pfeiffer is called bottleneck here, with bottleneck_placement: pfeiffer"),
        ("bottleneck_size: 8", "bottleneck_size: is for method: bottleneck, got method: full"),
        (
            "lora_target_modules: [q_proj]",
            "lora_target_modules: is for method: lora, dora, qlora or ia3, got method: full",
        ),
        (
            "method: bottleneck\nsave_dtype: bfloat16",
            "save_dtype: method: bottleneck saves an adapter alone, in float32",
        ),
        ("method: lora\nprefix_projection: true", "prefix_projection: is for method: prefix, got method: lora"),
        ("method: prefix\nencoder_hidden_size: 8", "encoder_hidden_size: is the width of prefix_projection"),
        ("method: adaptor", "expected one of full, freeze, head, lora"),
        ("use_peft: true", "called method: lora here"),
    ],
)
def test_refused(tmp_path, changes, words):
    (tmp_path / "sft.yaml").write_text(f"output_dir: o\nmodel_name_or_path: m\ntrain_dataset: d.jsonl\n{changes}\n")
    with pytest.raises(UserError, match=words):
        load_recipe("sft", str(tmp_path / "sft.yaml"))


@pytest.mark.parametrize("name", [name for name, stage in STAGES.items() if stage.methods])
def test_keys_of_another_method_are_refused_in_every_stage(name):
    stage = STAGES[name]
    lora = ("lora", "dora", "qlora")
    values = {  # key: a value, and the methods that read it
        "freeze_layers": (1, ("freeze",)),
        "trainable_pattern": ("x", ("freeze",)),
        "lora_r": (8, lora),
        "lora_alpha": (8, lora),
        "lora_target_modules": (["q_proj"], (*lora, "ia3")),
        "num_virtual_tokens": (3, ("prompt", "prefix")),
        "prefix_projection": (True, ("prefix",)),
        "encoder_hidden_size": (8, ("prefix",)),
        "bottleneck_size": (8, ("bottleneck",)),
        "bottleneck_placement": ("pfeiffer", ("bottleneck",)),
    }
    assert values.keys() == OF_METHOD.keys()
    keys = {each.name: "x" for each in dataclasses.fields(stage.recipe) if each.metadata.get("required")}
    for method in stage.methods:
        given = {**keys, "method": method, "freeze_layers": int(method == "freeze")}
        check_method(stage.recipe(**given), stage.methods, str)
        for key, (value, readers) in values.items():
            if method not in readers:
                with pytest.raises(UserError, match=f"^{key}: is for method: .*, got method: {method}; leave it out"):
                    check_method(stage.recipe(**{**given, key: value}), stage.methods, str)


def test_stages_that_cannot_use_a_method_say_why(tmp_path):
    (tmp_path / "ppo.yaml").write_text("output_dir: o\nsft_model_path: m\ntrain_dataset: d.jsonl\nmethod: prompt\n")
    with pytest.raises(
        UserError,
        match=r"expected one of full, lora, dora, ia3, bottleneck in the ppo stage, got prompt, which cannot be merged",
    ):
        load_recipe("ppo", str(tmp_path / "ppo.yaml"))


def test_more_layers_frozen_than_there_are(tmp_path):
    with pytest.raises(UserError, match="freeze_layers: expected at most 2"):
        run(recipe(tmp_path, method="freeze", freeze_layers=3))


def test_a_pattern_that_fits_nothing(tmp_path):
    with pytest.raises(
        UserError, match=r"trainable_pattern: 'blocks' matches no parameter; their names are like model.embed"
    ):
        run(recipe(tmp_path, method="freeze", trainable_pattern="blocks"))
