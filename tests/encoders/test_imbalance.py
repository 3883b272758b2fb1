"""Imbalanced labels: the weighted loss is torch's over the global batch, and balanced sampling draws all labels equally often."""

from __future__ import annotations

import dataclasses
from collections import Counter

import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight
from torch.nn.functional import cross_entropy

from align.encoders.classify import run
from align.encoders.imbalance import BalancedSampler, class_weights, describe_imbalance
from align.encoders.labels import find_labels
from align.errors import UserError
from align.runs.manifest import read_manifest
from tests import ranks
from tests.encoders.test_classify import HELD_OUT, ROWS, alone, labelled, recipe, untrained
from tests.worlds import deepspeed_file, metrics, save_recipe, trained

NAMES = ["maybe", "no", "yes"]
WEIGHTS = {"yes": 0.5, "maybe": 1.5, "no": 0.25}


def weighted_loss(model, rows, weights: list[float]) -> torch.Tensor:
    """torch's loss of all rows together."""
    logits = torch.stack([alone(model, text) for text, _ in rows])
    targets = torch.tensor([NAMES.index(label) for _, label in rows])
    return cross_entropy(logits, targets, weight=torch.tensor(weights), reduction="mean")


@pytest.mark.parametrize("setting", ["balanced", WEIGHTS, {name: weight / 100 for name, weight in WEIGHTS.items()}])
@pytest.mark.parametrize("size", [4, 1])
def test_a_step_is_on_torchs_weighted_loss_of_the_whole_batch(tmp_path, setting, size):
    """Rows of different weights in microbatches of one and of four; three rows and one of padding."""
    rows = [ROWS[0], ROWS[1], ROWS[3]]
    keys = {  # the first step of nesterov's momentum is 1.5 gradients, at half of the highest learning rate
        "optim": "sgd",
        "optim_args": {"momentum": 0.5, "nesterov": True},
        "learning_rate": 0.2,
        "lr_scheduler_type": "cosine_warmup_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr_rate": 0.0, "warmup_lr_rate": 0.5},
        "warmup_steps": 2,
        "adam_epsilon": 1e-8,
    }
    settings = recipe(tmp_path, rows, max_steps=1, per_device_train_batch_size=size, class_weights=setting, **keys)
    run(settings)
    weights = [1.0, 1.0, 1.0] if setting == "balanced" else [setting[name] for name in NAMES]
    model = untrained(settings, 3)
    loss = weighted_loss(model, rows, weights)
    loss.backward()
    assert metrics(settings)[0]["train/loss"] == pytest.approx(float(loss), abs=1e-5)
    for name, weight in trained(settings).items():
        parameter = model.get_parameter(name)
        gradient = 0 if parameter.grad is None else parameter.grad
        torch.testing.assert_close(weight, (parameter - 0.15 * gradient).detach(), atol=2e-6, rtol=0)
    assert read_manifest(settings.output_dir)["class_weights"] == pytest.approx(weights)


def test_two_ranks_divide_by_the_weights_of_both(tmp_path):
    """Rows of the batch have other weights on each rank; labels are drawn equally often; the evaluation is not weighted."""
    settings = recipe(tmp_path, ROWS, HELD_OUT, max_steps=3, class_weights=WEIGHTS, balanced_sampling=True, optim="adagrad",
                      optim_args={"eps": 0.01}, weight_decay=0.1, lr_scheduler_type="linear", adam_epsilon=1e-8)  # fmt: skip
    results = run(settings)
    shared = dataclasses.replace(
        settings,
        output_dir=str(tmp_path / "shared"),
        deepspeed=deepspeed_file(tmp_path / "zero2.json", 2),
        per_device_train_batch_size=1,
    )
    done = ranks.run_stage("classify", save_recipe(shared, tmp_path / "recipe.yaml"), ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    for name, weight in trained(settings).items():
        torch.testing.assert_close(trained(shared)[name], weight, atol=2e-6, rtol=0)
    for mine, theirs in zip(metrics(settings), metrics(shared), strict=True):
        for name in ("train/loss", "train/accuracy", "eval/loss"):
            assert theirs.get(name) == pytest.approx(mine.get(name), abs=1e-5)
    model = untrained(settings, 3)
    assert metrics(settings)[0]["eval/loss"] == pytest.approx(
        float(weighted_loss(model, HELD_OUT, [1.0, 1.0, 1.0])), abs=1e-5
    )
    assert results.metrics["eval_loss_before"] == metrics(settings)[0]["eval/loss"]


def test_balanced_weights_are_those_of_scikit_learn():
    labels = [0] * 6 + [1] * 3 + [2]
    label_set = find_labels(labelled("a", "b", "c"), [], None)
    expected = compute_class_weight("balanced", classes=np.arange(3), y=labels)
    assert class_weights("balanced", label_set, labels) == pytest.approx(expected.tolist())
    assert class_weights({"c": 3.0, "a": 1.0, "b": 2.0}, label_set, labels) == [1.0, 2.0, 3.0]
    assert class_weights(None, label_set, labels) is None
    numbers = find_labels(labelled(2, 0, 1), [], None)
    assert class_weights({"0": 5.0, "1": 6.0, "2": 7.0}, numbers, [0, 1, 2]) == [5.0, 6.0, 7.0]


class TestBalancedSampling:
    LABELS = (0,) * 11 + (1,) * 3 + (2,) * 2

    def epoch(self, number: int, seed: int = 1) -> list[int]:
        sampler = BalancedSampler(self.LABELS, 16, seed)
        sampler.set_epoch(number)
        rows = list(sampler)
        assert len(rows) == len(sampler) == 16
        return rows

    def test_labels_are_drawn_equally_often_and_their_rows_take_turns(self):
        epochs = [self.epoch(number) for number in range(6)]
        for rows in epochs:
            assert set(Counter(self.LABELS[row] for row in rows).values()) <= {5, 6}
        drawn = Counter(row for rows in epochs for row in rows)  # 96 draws, 32 of each label
        assert [drawn[row] for row in range(11)] == pytest.approx([32 / 11] * 11, abs=1)
        assert sorted(drawn[row] for row in (11, 12, 13)) == [10, 11, 11]
        assert [drawn[row] for row in (14, 15)] == [16, 16]

    def test_every_turn_has_an_order_of_its_own(self):
        sampler, halves = BalancedSampler((0,) * 4, 2, 1), set()  # a turn of the four rows is two epochs
        for number in range(0, 16, 2):
            sampler.set_epoch(number)
            halves.add(frozenset(sampler))
        assert len(halves) > 1

    def test_the_stage_draws_so(self, tmp_path):
        rows = [(letter, "yes") for letter in "abcdefg"] + [("abcdefghi", "no")]
        settings = recipe(tmp_path, rows, num_train_epochs=1, balanced_sampling=True)
        run(settings)
        assert metrics(settings)[-1]["train/num_tokens"] == 4 * 1 + 4 * 9

    def test_the_order_depends_on_seed_and_epoch_alone(self):
        assert self.epoch(3) == self.epoch(3)
        assert self.epoch(3) != self.epoch(4)
        assert self.epoch(3) != self.epoch(3, seed=2)
        assert sorted(self.LABELS[row] for row in self.epoch(0)) != [self.LABELS[row] for row in self.epoch(0)]


@pytest.mark.parametrize(
    ("rows", "changes", "said"),
    [
        (ROWS, {"class_weights": {"yes": 1, "no": 1, "mayb": 2}}, "class_weights.mayb: no training row has this label; did you mean 'maybe'?; they have"),
        (ROWS, {"class_weights": {"yes": 1.0}}, "class_weights: no weight of maybe, no; give one for each label"),
        ([("a", ["x"]), ("b", ["y"])], {"class_weights": "balanced"}, "these are of problem_type: multi_label_classification"),
        ([("a", 0.5), ("b", 1.5)], {"balanced_sampling": True}, "balanced_sampling: is for rows with one label each"),
    ],
)  # fmt: skip
def test_keys_that_do_not_fit_the_labels(tmp_path, rows, changes, said):
    with pytest.raises(UserError) as error:
        run(recipe(tmp_path, rows, **changes))
    assert said in str(error.value)


def test_the_imbalance_in_words():
    label_set = find_labels(labelled(*["a"] * 6, *["b"] * 3, "c"), [], None)
    assert describe_imbalance(label_set) == (
        "always choosing the commonest label is right in 60.0% of the training rows, and it has 6 times the rows of the rarest"
    )
