"""What PPO offers beyond its core: each against an exact answer, then all of it together, sharded, killed and resumed."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from align.config.load import load_recipe
from align.config.ppo import PPORecipe
from align.data.batches import PromptLoader
from align.engine.ema import EMA
from align.errors import UserError
from align.maths.kl import adapted_kl_coef, k2
from align.maths.losses import token_entropy
from align.maths.running_moments import RunningMoments
from align.models.forward import response_logits, response_logprobs
from align.ppo.ppo_run import Models, PPORun, Progress
from align.ppo.rollout import Rollout
from align.ppo.step import normalize_and_clip_scores
from align.ppo.train import run
from align.ppo.update import optimize
from align.runs.own_files import read_mark
from tests.ppo.runs import advantages_of, ppo_run, rollout_of
from tests.ppo.test_train import assert_same_curve, make_recipe, metrics
from tests.ranks import run_stage
from tests.worlds import LETTERS, deepspeed_file, write_jsonl


def recipe_of(folder: Path, **changes) -> PPORecipe:
    recipe = load_recipe("ppo", make_recipe(folder, **changes))
    assert isinstance(recipe, PPORecipe)
    return recipe


def start(recipe: PPORecipe) -> tuple[PPORun, Rollout]:
    """A run before its first update, and its first rollout."""
    run = ppo_run(recipe)
    return run, rollout_of(run)


def shake(models: Models, seed: int = 3) -> None:
    """Move the policy away from the reference."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in models.policy.module.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def first_gradient(run: PPORun, rollout: Rollout, advantages: torch.Tensor, kl_coef: float = 0.0, returns=None):
    """The policy's gradient at its first optimizer step, which is not taken, by parameter."""
    seen: list[dict[str, torch.Tensor]] = []
    policy = run.models.policy

    def step(_: float) -> float:
        if not seen:
            seen.append({n: p.grad.clone() for n, p in policy.module.named_parameters()})
        policy.discard()
        return 0.0

    policy.step = step  # type: ignore[method-assign]
    run.progress.kl_coef, run.learning_rates = kl_coef, [(1e-3, 0.0)]
    optimize(run, rollout, advantages, torch.zeros_like(advantages) if returns is None else returns, 0)
    return seen[0]


def assert_gradients(got, expected, tolerance=1e-6) -> None:
    assert max(float(gradient.abs().max()) for gradient in expected.values()) > 100 * tolerance
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], atol=tolerance, rtol=1e-4)


def gradient_of(model, objective) -> dict[str, torch.Tensor]:
    """By `backward`, since an engine sums some gradients in place."""
    model.zero_grad()
    objective.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def whole(rollout: Rollout) -> tuple[torch.Tensor, torch.Tensor, int]:
    ids = torch.cat([rollout.prompt_ids, rollout.response_ids], dim=1)
    return ids, torch.cat([rollout.prompt_mask, rollout.mask], dim=1), rollout.mask.shape[1]


ONE_STEP = {"num_ppo_epochs": 1, "rollout_batch_size": 16, "minibatch_size": 16, "per_device_train_batch_size": 3}


class TestLossTerms:
    def test_ptx_is_added_to_the_same_step(self, tmp_path):
        """grad = grad PPO + 27.8 grad LM (arXiv 2203.02155 eq. 2), over prompts and texts of several lengths."""
        texts = [{"text": LETTERS[: 3 + i % 5]} for i in range(7)]
        recipe = recipe_of(tmp_path, ptx_dataset=write_jsonl(tmp_path / "texts.jsonl", texts), ptx_coef=27.8,
                           ptx_batch_size=5, **ONE_STEP)  # fmt: skip
        ppo, rollout = start(recipe)
        rows, ppo.ptx = ppo.ptx, None
        advantages = torch.randn(rollout.mask.shape, generator=torch.Generator().manual_seed(0))
        alone = first_gradient(ppo, rollout, advantages)
        ppo.ptx = rows
        joint = first_gradient(ppo, rollout, advantages)

        model = ppo.models.policy.module
        total, count = 0.0, 0
        for index in PromptLoader(len(rows), recipe.seed).batch(0, 5):
            ids = torch.tensor([rows[index]["input_ids"]])
            log_p = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
            total = total - log_p[range(ids.shape[1] - 1), ids[0, 1:]].sum()
            count += ids.shape[1] - 1
        text = gradient_of(model, 27.8 * total / count)
        assert_gradients(joint, {name: alone[name] + text[name] for name in alone}, 1e-5)

    def test_the_entropy_bonus(self, tmp_path):
        ppo, rollout = start(recipe_of(tmp_path, **ONE_STEP))
        advantages = torch.zeros_like(rollout.values)
        ppo.recipe = dataclasses.replace(ppo.recipe, entropy_coef=0.7)
        got = first_gradient(ppo, rollout, advantages)
        logits = response_logits(ppo.models.policy, *whole(rollout))
        bonus = (token_entropy(logits, 0.9) * rollout.mask).sum() / rollout.mask.sum()
        assert_gradients(got, gradient_of(ppo.models.policy.module, -0.7 * bonus))

    def test_the_kl_in_the_loss(self, tmp_path):
        ppo, rollout = start(recipe_of(tmp_path, use_kl_loss=True, kl_estimator="k2", **ONE_STEP))
        shake(ppo.models)
        got = first_gradient(ppo, rollout, torch.zeros_like(rollout.values), kl_coef=0.3)
        logprobs = response_logprobs(ppo.models.policy, *whole(rollout), 0.9)
        kl = (k2(logprobs, rollout.ref_logprobs) * rollout.mask).sum() / rollout.mask.sum()
        assert_gradients(got, gradient_of(ppo.models.policy.module, 0.3 * kl))

    def test_the_kl_is_then_not_in_the_reward(self, tmp_path):
        recipe = recipe_of(tmp_path, lam=1.0)
        ppo, rollout = start(recipe)
        rollout.ref_logprobs = rollout.old_logprobs - 1.0
        with_loss = dataclasses.replace(ppo, recipe=dataclasses.replace(recipe, use_kl_loss=True, kl_estimator="k3"))
        scores = rollout.scores
        assert not torch.equal(
            advantages_of(ppo, rollout, scores, 0.5)[1],
            advantages_of(with_loss, rollout, scores, 0.5)[1],
        )
        torch.testing.assert_close(
            advantages_of(with_loss, rollout, scores, 0.5)[1],
            advantages_of(ppo, rollout, scores, 0.0)[1],
        )

    @pytest.mark.parametrize("estimator", ["gae", "grpo", "dr_grpo"])
    @pytest.mark.parametrize("micro", [1, 2, 5, 16])
    def test_the_gradient_does_not_depend_on_the_cut(self, tmp_path, estimator, micro):
        """Responses of many lengths, whose share in the objective the three aggregations weigh differently."""
        recipe = recipe_of(tmp_path, advantage_estimator=estimator, num_generations=2, **ONE_STEP)
        ppo, rollout = start(recipe)
        advantages = torch.randn(rollout.mask.shape, generator=torch.Generator().manual_seed(0)) * rollout.mask
        ppo.plan = dataclasses.replace(ppo.plan, micro_batch_size=micro)
        got = first_gradient(ppo, rollout, advantages)
        logprobs = response_logprobs(ppo.models.policy, *whole(rollout), 0.9)
        surrogate = -advantages * (logprobs - rollout.old_logprobs).exp() * rollout.mask
        lengths = rollout.mask.sum(1)
        assert len(set(lengths.tolist())) > 2
        objective = {
            "gae": surrogate.sum() / lengths.sum(),
            "grpo": (surrogate.sum(1) / lengths).mean(),
            "dr_grpo": surrogate.sum() / (len(rollout) * recipe.response_length),
        }[estimator]
        assert_gradients(got, gradient_of(ppo.models.policy.module, objective))

    def test_more_padding_changes_nothing(self, tmp_path, monkeypatch):
        ppo, rollout = start(recipe_of(tmp_path, **ONE_STEP))
        advantages = torch.randn(rollout.mask.shape, generator=torch.Generator().manual_seed(0))
        expected = first_gradient(ppo, rollout, advantages)
        pad = torch.nn.functional.pad
        wider = dataclasses.replace(
            rollout,
            prompt_ids=pad(rollout.prompt_ids, (7, 0), value=5), prompt_mask=pad(rollout.prompt_mask, (7, 0)),
            **{name: pad(getattr(rollout, name), (0, 5), value=9) for name in
               ("response_ids", "old_logprobs", "ref_logprobs", "values", "sampled_logprobs", "token_scores")},
            mask=pad(rollout.mask, (0, 5)),
        )  # fmt: skip
        monkeypatch.setattr(
            Rollout, "rows", lambda self, i: type(self)(**{name: getattr(self, name)[i] for name in self.axes()})
        )
        assert_gradients(first_gradient(ppo, wider, pad(advantages, (0, 5), value=9.0)), expected)


class TestScores:
    def test_clipping_leaves_the_kl_alone(self, tmp_path):
        recipe = recipe_of(tmp_path, score_clip=5.0, lam=1.0)
        ppo, rollout = start(recipe)
        rollout.scores = torch.full((16,), 9.0)
        rollout.values.zero_()
        rollout.ref_logprobs = rollout.old_logprobs + 0.25
        scores = normalize_and_clip_scores(ppo, rollout)
        assert scores.tolist() == [5.0] * 16
        _, returns = advantages_of(ppo, rollout, scores, 0.1)
        torch.testing.assert_close(returns[:, 0], 5.0 + 0.1 * 0.25 * rollout.lengths)

    def test_normalisation_is_by_the_moments_of_all_scores_so_far(self, tmp_path):
        recipe = recipe_of(tmp_path, normalize_scores=True)
        ppo, rollout = start(recipe)
        progress = ppo.progress = Progress(0.1)
        rollout.scores = torch.tensor([1.0] * 8 + [3.0] * 8)
        assert normalize_and_clip_scores(ppo, rollout).tolist() == [-1.0] * 8 + [1.0] * 8
        rollout.scores = torch.full((16,), 6.0)
        # All 32: mean 4, variance (8 * 9 + 8 * 1 + 16 * 4) / 32 = 4.5
        torch.testing.assert_close(normalize_and_clip_scores(ppo, rollout), torch.full((16,), 2 / 4.5**0.5))
        assert progress.score_moments == RunningMoments(32, 4.0, 144.0)

    def test_advantages_are_white_over_the_real_tokens(self, tmp_path):
        recipe = recipe_of(tmp_path)
        ppo, rollout = start(recipe)
        assert not rollout.mask.all(), "the test wants padding"
        rollout.scores = torch.arange(16.0)
        advantages, _ = advantages_of(ppo, rollout, rollout.scores, 0.1)
        real = advantages[rollout.mask]
        assert float(real.mean()) == pytest.approx(0.0, abs=1e-5)
        assert float(real.std(correction=0)) == pytest.approx(1.0, abs=1e-4)
        assert not advantages[~rollout.mask].any()

    def test_rewards_of_single_tokens_stay_on_them(self, tmp_path):
        recipe = recipe_of(tmp_path, lam=1.0)
        ppo, rollout = start(recipe)
        row = int(rollout.lengths.argmax())
        length = int(rollout.lengths[row])
        rollout.values.zero_()
        rollout.ref_logprobs = rollout.old_logprobs
        rollout.token_scores = torch.arange(1.0, 1 + rollout.mask.shape[1]).expand_as(rollout.values) * rollout.mask
        scores = rollout.token_scores.sum(1) + 10.0  # another source, for the whole response
        _, returns = advantages_of(ppo, rollout, scores, 0.1)
        to_go = [sum(range(t, length + 1)) + 10.0 for t in range(1, length + 1)]
        assert returns[row, :length].tolist() == to_go

    def test_a_reward_function_for_single_tokens_trains(self, tmp_path):
        (tmp_path / "dense_for_test.py").write_text(
            "def count_a(completion_ids, **columns):\n    return [[float(token == 3) for token in ids] for ids in completion_ids]\n"
        )
        results = run(recipe_of(tmp_path, reward_funcs=["dense_for_test:count_a"], missing_eos_penalty=None))
        before, after = next(row[1:] for row in results.table if row[0].startswith("score"))
        assert after > before + 0.2


class TestSchedule:
    def test_an_update_ends_before_it_goes_too_far(self, tmp_path):
        run(recipe_of(tmp_path, max_approx_kl=1e-9))
        for row in metrics(tmp_path / "out"):
            if "policy/steps" in row:
                assert row["policy/steps"] == 1, "the first minibatch is at ratio 1, the second is not"

    def test_only_the_value_model_trains_while_it_warms_up(self, tmp_path):
        recipe = recipe_of(tmp_path, value_warmup_updates=6, kl_target=5.0, kl_horizon=100, kl_coef=0.2)
        run(recipe)
        trained, reference = (
            load_file(Path(p) / "model.safetensors") for p in (recipe.output_dir, recipe.sft_model_path)
        )
        assert all(torch.equal(trained[name], reference[name]) for name in reference)
        rows = [row for row in metrics(tmp_path / "out") if "value/loss" in row]
        value = load_file(tmp_path / "out" / "value" / "model.safetensors")
        assert all(not torch.equal(value[name], reference[name]) for name in value.keys() & reference.keys())
        assert not any(name in row for row in rows for name in ("policy/loss", "policy/first_ratio"))
        assert [row["objective/kl"] for row in rows] == pytest.approx([0.0] * len(rows), abs=1e-5)
        assert {row["objective/kl_coef"] for row in rows} == {0.2}, (
            "the KL of a policy that does not train says nothing"
        )

    def test_the_coefficient_adapts_to_the_kl_of_each_update(self, tmp_path):
        run(recipe_of(tmp_path, kl_target=5.0, kl_horizon=100, kl_coef=0.2))
        rows = [row for row in metrics(tmp_path / "out") if "objective/kl_coef" in row]
        expected = 0.2
        for row in rows:
            assert row["objective/kl_coef"] == pytest.approx(expected, rel=1e-12)
            expected = adapted_kl_coef(expected, row["objective/kl"], 5.0, 16, 100)
        assert len({row["objective/kl_coef"] for row in rows}) == 6


@pytest.mark.parametrize(
    ("update", "gap", "trusted"),
    [(0, 0.0, False), (1, 1e-6, True), (1, 1e-4, False), (15, 1e-6, True), (16, 1e-6, False)],
)
def test_sampling_is_trusted_where_it_proved_to_agree_and_compared_again(tmp_path, update, gap, trusted):
    ppo = ppo_run(recipe_of(tmp_path))
    ppo.progress.sampler_gap = gap
    rollout, progress = rollout_of(ppo, update), ppo.progress
    assert torch.equal(rollout.old_logprobs, rollout.sampled_logprobs) == trusted
    if trusted:
        assert progress.sampler_gap == gap
    else:
        assert progress.sampler_gap == float((rollout.old_logprobs - rollout.sampled_logprobs).abs().max()) < 1e-5


class TestGroups:
    def test_responses_to_one_prompt_are_neighbours_and_differ(self, tmp_path):
        _, rollout = start(recipe_of(tmp_path, num_generations=4, advantage_estimator="rloo"))
        groups = rollout.prompt_ids.view(4, 4, -1)
        assert all(torch.equal(groups[:, 0], groups[:, i]) for i in range(4))
        assert len({tuple(row.tolist()) for row in rollout.prompt_ids}) == 4
        assert len({tuple(row.tolist()) for row in rollout.response_ids[:4]}) > 1

    @pytest.mark.parametrize("estimator", ["rloo", "grpo", "dr_grpo", "reinforce_plus_plus"])
    def test_no_value_model_is_there(self, tmp_path, estimator):
        recipe = recipe_of(tmp_path, advantage_estimator=estimator, num_generations=4, total_episodes=192)
        results = run(recipe)
        before, after = next(row[1:] for row in results.table if row[0].startswith("score"))
        assert after > before + 0.05
        assert not (tmp_path / "out" / "value").exists()
        assert not any(name.startswith("value/") for row in metrics(tmp_path / "out") for name in row)


class TestEMA:
    def test_the_window_by_hand(self, tmp_path):
        ppo, _ = start(recipe_of(tmp_path))
        policy = ppo.models.policy
        with torch.no_grad():
            for parameter in policy.module.parameters():
                parameter.zero_()
        ema = EMA(policy, 0.992)
        with torch.no_grad():
            for parameter in policy.module.parameters():
                parameter.fill_(1.0)
        for _ in range(86):
            ema.update()
        assert float(ema.averages["lm_head.weight"][0, 0]) == pytest.approx(0.4988, abs=1e-4)
        ema.update()
        ema.save_pretrained(tmp_path / "ema")
        saved = AutoModelForCausalLM.from_pretrained(tmp_path / "ema")
        assert {round(float(value), 4) for p in saved.parameters() for value in p.detach().flatten()[:2]} == {0.5028}


class TestLora:
    def test_the_reference_is_the_policy_with_its_adapter_off(self, tmp_path):
        ppo, rollout = start(recipe_of(tmp_path, method="lora", lora_r=2))
        models = ppo.models
        assert models.reference.module is models.policy.module
        assert torch.equal(rollout.old_logprobs, rollout.ref_logprobs)
        with torch.no_grad():
            for name, parameter in models.policy.module.named_parameters():
                if "lora_B" in name:
                    parameter.normal_()
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
        with torch.no_grad():
            logprobs = [
                response_logprobs(model, *whole(rollout), 0.9) for model in (models.reference, plain, models.policy)
            ]
        assert torch.equal(logprobs[0], logprobs[1])
        assert (logprobs[2] - logprobs[0]).abs().max() > 0.1

    def test_what_is_saved_is_plain_and_of_the_adapters_rank(self, tmp_path):
        recipe = recipe_of(tmp_path, method="lora", lora_r=2, learning_rate=2e-2)
        results = run(recipe)
        before, after = next(row[1:] for row in results.table if row[0].startswith("score"))
        assert after > before
        trained, base = (load_file(Path(p) / "model.safetensors") for p in (recipe.output_dir, recipe.sft_model_path))
        assert trained.keys() == base.keys()
        changed = {name for name in base if not torch.equal(trained[name], base[name])}
        assert changed == {name for name in base if name.endswith("_proj.weight")}
        for name in changed:
            assert int(torch.linalg.matrix_rank(trained[name] - base[name], rtol=1e-3)) <= 2
        plain = AutoModelForCausalLM.from_pretrained(recipe.output_dir).state_dict()
        adapted = AutoPeftModelForCausalLM.from_pretrained(f"{recipe.output_dir}/adapter").merge_and_unload()
        for name, weight in adapted.state_dict().items():
            torch.testing.assert_close(weight, plain[name], atol=1e-6, rtol=0)


SHORT_SEQUENCE = {"total_episodes": 64, "num_ppo_epochs": 2}  # ZeRO 3 takes half a second a step


def everything(folder: Path, **changes) -> str:
    """A recipe that switches on all that has a state of its own."""
    texts = [{"text": LETTERS[: 3 + i % 5]} for i in range(7)]
    return make_recipe(
        folder, ptx_dataset=write_jsonl(folder / "texts.jsonl", texts), ptx_coef=0.1, ptx_batch_size=6, ema_decay=0.8,
        kl_target=0.05, kl_horizon=100, normalize_scores=True, score_clip=2.0, entropy_coef=0.01, dual_clip=3.0,
        value_warmup_updates=1, max_approx_kl=0.05, use_kl_loss=True, kl_estimator="k2",
        max_prompt_length=8, max_tokens_per_device=40, per_device_train_batch_size=8, **SHORT_SEQUENCE, **changes,
    )  # fmt: skip


def adapter(folder: Path, **changes) -> str:
    return make_recipe(
        folder, method="lora", lora_r=4, learning_rate=3e-3, advantage_estimator="rloo", num_generations=2,
        gradient_checkpointing=True, ema_decay=0.5, **SHORT_SEQUENCE, **changes,
    )  # fmt: skip


@pytest.fixture(scope="module", params=[everything, adapter], ids=["everything", "adapter"])
def finished(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("features")
    run(load_recipe("ppo", request.param(folder)))
    return request.param, folder / "out"


def same_weights(ours: Path, theirs: Path, tolerance: float) -> None:
    for part in ("", "ema"):
        a, b = (load_file(folder / part / "model.safetensors") for folder in (ours, theirs))
        assert a.keys() == b.keys()
        for name in a:
            torch.testing.assert_close(a[name], b[name], atol=tolerance, rtol=0)
    a, b = (load_file(folder / "model.safetensors") for folder in (ours, ours / "ema"))
    assert any(not torch.equal(a[name], b[name]) for name in a), "the average lags behind"


def assert_resumes(make, whole_run: Path, folder: Path) -> None:
    """What a SIGKILL right after the checkpoint of update 2 leaves behind; KL coefficient, moments and EMA go on."""
    recipe = load_recipe("ppo", make(folder), ["--accept_changes", "run.json"])  # it names the other folder
    out = folder / "out"
    for name in ("checkpoint-2", "best"):
        shutil.copytree(whole_run / name, out / name)
    for name in ("metrics.jsonl", "samples.jsonl"):
        shutil.copy(whole_run / name, out)
    (out / "best" / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(
        UserError, match=r"best: model.safetensors has 7 bytes, not \d+; put it back from a copy, or add"
    ):
        run(recipe)
    shutil.copy(whole_run / "best" / "model.safetensors", out / "best")
    run(recipe)
    assert read_mark(out / "stage.json")["accepted"][0]["at"] == "checkpoint-2"
    same_weights(whole_run, out, 0.0)
    assert_same_curve(metrics(whole_run), metrics(out), 0.0)
    assert (out / "samples.jsonl").read_text() == (whole_run / "samples.jsonl").read_text()


class TestTogether:
    def test_resumed_to_the_bit(self, finished, tmp_path):
        assert_resumes(*finished, tmp_path)
        assert '"kind": "collapse: length"' in (tmp_path / "out/samples.jsonl").read_text()

    @pytest.mark.parametrize("stage", [pytest.param(2, marks=pytest.mark.slow), 3])
    def test_two_ranks_do_what_one_does(self, finished, tmp_path, stage):
        make, alone = finished
        files = {"deepspeed": deepspeed_file(tmp_path / "policy.json", stage)}
        if stage == 3 and make is everything:  # each model in its own way
            files["value_deepspeed"] = deepspeed_file(tmp_path / "value.json", 2)
            offload = json.loads(Path(files["deepspeed"]).read_text())
            offload["zero_optimization"]["offload_param"] = {"device": "cpu"}
            (tmp_path / "reference.json").write_text(json.dumps(offload))
            files["reference_deepspeed"] = str(tmp_path / "reference.json")
        done = run_stage("ppo", make(tmp_path, **files))
        assert done.returncode == 0, done.stderr[-3000:]
        assert_same_curve(metrics(alone), metrics(tmp_path / "out"), 5e-4)
        same_weights(alone, tmp_path / "out", 5e-4)


UNBALANCED = [
    *(({name: value}, rf"{name}: objective: trajectory_balance does not read it, got {value}; leave it out") for name, value in (
        ("advantage_estimator", "rloo"), ("num_ppo_epochs", 3), ("cliprange", 0.1), ("dual_clip", 3.0), ("max_approx_kl", 0.1),
        ("gamma", 0.9), ("lam", 1.0), ("whiten_rewards", True), ("entropy_coef", 0.1), ("use_kl_loss", True),
        ("kl_estimator", "k3"), ("cliprange_value", 1.0),
    )),
    *(({name: value, "num_generations": 2}, rf"{name}: .* does not read it with num_generations of 2 or more, got .*{value}")
      for name, value in (("value_model_path", "x"), ("value_deepspeed", "ds.json"), ("value_learning_rate", 0.1),
                          ("value_warmup_updates", 1))),
    ({"num_generations": 4, "minibatch_size": 6}, r"minibatch_size: expected a multiple of num_generations \(4\) .* got 6"),
    ({"num_generations": 4, "kl_coef": 0}, r"kl_coef: expected a number above 0 with objective: trajectory_balance.* got 0"),
]  # fmt: skip


class TestRefused:
    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            *(({"objective": "trajectory_balance", "num_ppo_epochs": 4, **more}, words) for more, words in UNBALANCED),
            ({"replay_size": 3}, r"replay_size: objective: ppo does not read it, got 3; leave it out"),
            ({"gradient_steps": 3}, r"gradient_steps: objective: ppo does not read it, got 3; leave it out"),
            ({"kl_estimator": "k3"}, r"kl_estimator: k3 inside the reward has a gradient that vanishes.*use k1"),
            ({"kl_estimator": "k2"}, r"kl_estimator: k2 inside the reward is biased"),
            ({"use_kl_loss": True}, r"kl_estimator: k1 as a loss has an expected gradient of 0.*use k2"),
            ({"advantage_estimator": "grpo"}, r"num_generations: expected 2 or more with advantage_estimator: grpo"),
            ({"num_generations": 3}, r"num_generations: expected a divisor of rollout_batch_size \(16\), got 3"),
            ({"advantage_estimator": "rloo", "num_generations": 2, "value_model_path": "x"}, r"value_model_path: .*no value"),
            ({"dual_clip": 0.9}, r"dual_clip: expected a number above 1"),
            ({"ema_decay": 1.0}, r"ema_decay: expected a number from 0 to below 1"),
            ({"method": "lora", "reference_deepspeed": "ds.json"}, r"reference_deepspeed: with an adapter the reference is"),
            ({"top_k": 50}, r"top_k: unknown key; refused: it would sample from another distribution"),
            ({"ptx_dataset": "nowhere.jsonl"}, r"nowhere.jsonl"),
        ],
    )  # fmt: skip
    def test_with_the_reason(self, tmp_path, changes, words):
        deepspeed_file(tmp_path / "ds.json", 3)
        with pytest.raises(UserError, match=words):
            run(load_recipe("ppo", make_recipe(tmp_path, **changes)))


def test_only_the_policy_folder_is_needed_for_a_second_run(tmp_path):
    """The value model may start from a path: here the one that a run before has saved."""
    run(recipe_of(tmp_path, total_episodes=16))
    shutil.copytree(tmp_path / "out" / "value", tmp_path / "value")
    shutil.rmtree(tmp_path / "out")
    recipe = recipe_of(tmp_path, value_model_path=str(tmp_path / "value"))
    ppo, _ = start(recipe)
    weights = load_file(tmp_path / "value" / "model.safetensors")
    for name, parameter in ppo.models.value.module.named_parameters():
        assert torch.equal(parameter, weights[name]), name
