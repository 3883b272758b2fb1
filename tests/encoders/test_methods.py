"""Every `method` in the stages that label tokens and find answers: what is saved loads by `align predict` and is what was evaluated."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from seqeval.metrics import f1_score
from torch.nn.functional import cross_entropy

from align.cli.predict import load
from align.config.load import as_recipe
from align.encoders import question_answering, token_classification
from align.errors import UserError
from align.evaluate.squad import token_f1
from align.models.trainable import MERGEABLE
from tests.encoders import test_question_answering as answers
from tests.encoders import test_token_classification as tags

OTHERS = [
    pytest.param(name, marks=pytest.mark.slow) for name in ("head", "lora", "bottleneck")
]  # tested in one of the two
METHODS = ["freeze", "dora", "ia3", *OTHERS]


def keys(method: str) -> dict:
    return {"method": method, "max_steps": 2, **({"freeze_layers": 1} if method == "freeze" else {})}


@pytest.mark.parametrize("method", METHODS)
def test_tags(tmp_path, method):
    settings = tags.recipe(tmp_path, eval_rows=tags.HELD_OUT, **keys(method))
    found = token_classification.run(settings).metrics
    predictor = load(settings.output_dir)
    total = items = 0
    for row in tags.HELD_OUT:
        ids, labels = tags.encoded(*row)
        with torch.no_grad():
            logits = predictor.model(input_ids=ids).logits[0]
        total += float(cross_entropy(logits, labels[0], reduction="sum"))
        items += int((labels != -100).sum())
    assert found["eval_loss"] == pytest.approx(total / items, abs=1e-5)
    assert found["eval_loss"] != pytest.approx(found["eval_loss_before"], abs=1e-3)
    said = [each["predicted_tags"] for each in predictor.predict([{"tokens": words} for words, _ in tags.HELD_OUT])]
    assert found["eval_f1"] == pytest.approx(f1_score([true for _, true in tags.HELD_OUT], said, zero_division=0))
    assert (tmp_path / "out" / "adapter").is_dir() == (method in MERGEABLE)


@pytest.mark.parametrize("method", METHODS)
def test_answers(tmp_path, method):
    settings = answers.recipe(tmp_path, answers.ROWS, answers.HELD_OUT, **keys(method))
    found = question_answering.run(settings).metrics
    predictor = load(settings.output_dir)
    windows = [window for row in answers.HELD_OUT for window in answers.windows_by_hand(*row)]
    with torch.no_grad():
        losses = [float(answers.window_loss(predictor.model, *window)) for window in windows]
    assert found["eval_loss"] == pytest.approx(np.mean(losses), abs=1e-5)
    assert found["eval_loss"] != pytest.approx(found["eval_loss_before"], abs=1e-3)
    rows = [{"question": question, "context": context} for question, context, _ in answers.HELD_OUT]
    said = [each["predicted_answer"]["text"] for each in predictor.predict(rows)]
    gold = [[answer] if answer else [] for *_, answer in answers.HELD_OUT]
    assert found["eval_f1"] == pytest.approx(np.mean([token_f1(a, g) for a, g in zip(said, gold, strict=True)]))


@pytest.mark.parametrize("method", ["prompt", "prefix"])
@pytest.mark.parametrize("kind", [tags.TokenClassificationRecipe, answers.QuestionAnsweringRecipe])
def test_virtual_tokens_are_refused_by_name(kind, method):
    given = {"model_name_or_path": "m", "train_dataset": "d", "output_dir": "o", "method": method}
    with pytest.raises(UserError, match=rf"method: expected one of .*bottleneck in the .* stage, got {method}"):
        as_recipe(kind, given)
