"""The metric that chooses the best model is refused with the recipe, where its stage has no such metric."""

from __future__ import annotations

from pathlib import Path

import pytest

from align.config.load import load_recipe
from align.errors import UserError

SETTINGS = "output_dir: o\nmodel_name_or_path: m\ntrain_dataset: d.jsonl\nearly_stopping_patience: 1\neval_steps: 1\n"


@pytest.mark.parametrize(
    ("stage", "known", "unknown"),
    [
        ("sft", "mean_token_accuracy", "accuracy"),
        ("sft", "eval_spell/loss", "eval_spell_loss"),
        ("reward", "eval_margin", "eval_ceiling"),
        ("mlm", "eval_accuracy", "eval_macro_f1"),
        ("classify", "eval_macro_f1", "eval_macro_f2"),
        ("classify", "pearson", "spearman"),
        ("classify --problem_type regression", "eval_mse", "eval_accuracy"),
        ("classify --problem_type multi_label_classification", "eval_micro_f1", "eval_macro_f1_low"),
    ],
)
def test_names(tmp_path: Path, stage: str, known: str, unknown: str) -> None:
    stage, *words = stage.split()
    (tmp_path / "r.yaml").write_text(SETTINGS)
    load_recipe(stage, str(tmp_path / "r.yaml"), [*words, "--metric_for_best_model", known])
    with pytest.raises(
        UserError, match=rf"^--metric_for_best_model: no metric {unknown}.*; this stage evaluates eval_loss, "
    ):
        load_recipe(stage, str(tmp_path / "r.yaml"), [*words, "--metric_for_best_model", unknown])
