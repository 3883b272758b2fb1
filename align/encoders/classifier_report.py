"""Results before and after training, for the stages that put a head on a backbone, and the model card of a classifier."""

from __future__ import annotations

from typing import Any

from align.encoders.labels import MULTI, REGRESSION, LabelSet
from align.runs.markdown import code_span, markdown_text, python_text

METRIC_NAMES = {
    "accuracy": "accuracy",
    "accuracy_low": "accuracy, 95% interval from",
    "accuracy_high": "accuracy, 95% interval to",
    "micro_f1": "micro F1",
    "exact_match": "exact match",
    "exact_match_low": "exact match, 95% interval from",
    "exact_match_high": "exact match, 95% interval to",
    "precision": "precision",
    "recall": "recall",
    "f1": "F1",
    "f1_low": "F1, 95% interval from",
    "f1_high": "F1, 95% interval to",
    "macro_f1": "macro F1",
    "macro_f1_low": "macro F1, 95% interval from",
    "macro_f1_high": "macro F1, 95% interval to",
    "macro_precision": "macro precision",
    "macro_recall": "macro recall",
    "mse": "mean squared error",
    "pearson": "Pearson correlation",
}


def constant_answer(label_set: LabelSet) -> str:
    """The baseline of a classifier, in words."""
    constant = {REGRESSION: "always the mean", MULTI: "always the commonest labels"}
    return constant.get(label_set.problem_type, "always the commonest label")


def evaluation_results(
    before: dict[str, float],
    after: dict[str, float],
    baseline: dict[str, float] | None,
    steps: int,
    *,
    item: str,
    rule: str,
) -> dict[str, Any]:
    """The stage's results from the evaluation logs before and after training; without evaluation, the steps alone.

    Args:
        baseline: metrics of the rule that the model has to beat.
        item: of which the loss is a mean, such as "row".
        rule: the baseline in words.
    """
    results: dict[str, Any] = {"steps": steps, "table": []}
    if baseline is None:
        return results
    for name in ("loss", *baseline):
        results[f"eval_{name}_before"], results[f"eval_{name}"] = before[f"eval_{name}"], after[f"eval_{name}"]
    results["baseline"] = baseline
    results["table"] = [[f"held-out loss (per {item})", before["eval_loss"], after["eval_loss"]]]
    named = [name for name in baseline if name in METRIC_NAMES]
    results["table"] += [
        [f"held-out {METRIC_NAMES[name]}", before[f"eval_{name}"], after[f"eval_{name}"]] for name in named
    ]
    results["table"] += [
        [f"{METRIC_NAMES[name]} of {rule}", None, baseline[name]]
        for name in named
        if not name.endswith(("pearson", "_low", "_high"))  # undefined for a constant
    ]
    return results


def model_card(base: str, folder: str, label_set: LabelSet, *, is_encoder: bool, pairs: bool) -> str:
    """The model card: the labels, and code that classifies a text, or a pair of texts."""
    ids = 'tokenizer(text)["input_ids"]'
    if pairs:
        ids = PAIR_IDS if is_encoder else DECODER_PAIR_IDS
    prediction = {
        REGRESSION: "value = float(logits)",
        MULTI: "labels = [model.config.id2label[i] for i, logit in enumerate(logits) if logit > 0]",
    }.get(label_set.problem_type, "label = model.config.id2label[int(logits.argmax())]")
    names = ", ".join(code_span(str(name)) for name in label_set.names)
    return CARD.format(
        base=markdown_text(base),
        problem=label_set.problem_type.replace("_", " "),
        names="" if label_set.problem_type == REGRESSION else f" of {names}",
        folder=python_text(folder),
        ids=ids,
        prediction=prediction,
    )


CARD = """# A text classifier

Trained from {base} by the `classify` stage of align: {problem}{names}.

```python
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

model = AutoModelForSequenceClassification.from_pretrained({folder})
tokenizer = AutoTokenizer.from_pretrained({folder})
ids = {ids}
logits = model(torch.tensor([ids])).logits[0]
{prediction}
```
"""
PAIR_IDS = 'tokenizer(text, text_pair)["input_ids"]'
DECODER_PAIR_IDS = """tokenizer(text + text_pair)["input_ids"]
ids += [tokenizer.eos_token_id] * (ids[-1] != tokenizer.eos_token_id)  # some tokenizers add it"""
