"""Predictions of trained models on the rows of a file: spans, answers and labels.

    token classifier      predicted_spans: [{start, end, label, text, score}], and of rows with `tokens` predicted_tags
    question answering    predicted_answer: {text, start, end, score}; of no answer the text is empty, without a place
    classifier            predicted_label and score; of several labels predicted_labels: [{label, score}]; a regression's number

Offsets are in characters of `text` (of `tokens` joined by single spaces) or `context`. The score of a span is the mean
probability of the labels that were read for it; that of an answer is its share among the 20 best ones and no answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedTokenizerBase,
)

from align.data.annotations import join_words
from align.data.collate import chunks, pad_right
from align.data.encode import encode_pair, ending_once
from align.data.rows import Tagged
from align.encoders.alignment import align, check_fast, decode, encode_offsets
from align.encoders.labels import MULTI, REGRESSION
from align.encoders.tags import OUTSIDE, WORDS
from align.encoders.windows import NBEST, Candidate, best_answers, encode_windows, null_score
from align.errors import BadRow, UserError
from align.models.model_types import is_encoder, is_encoder_decoder

AUTO = {  # by stage, and by the end of the name of the model's class
    "token-classification": (AutoModelForTokenClassification, "ForTokenClassification"),
    "question-answering": (AutoModelForQuestionAnswering, "ForQuestionAnswering"),
    "classify": (AutoModelForSequenceClassification, "ForSequenceClassification"),
}
BATCH = 32  # rows or windows in one forward pass
READER = {"max_length": 384, "doc_stride": 128, "max_answer_length": 30}  # of models that align did not train


@dataclass(frozen=True, slots=True)
class Predictor:
    """A trained model with what its stage recorded of it.

    Attributes:
        manifest: of the stage that trained it; empty for others' models.
        limit: tokens that the model reads.
    """

    model: Any
    tokenizer: PreTrainedTokenizerBase
    manifest: Mapping[str, Any]
    limit: int

    def predict(self, rows: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
        """What is predicted for each row, by column.

        Raises:
            BadRow: a row lacks a column, or is too long.
        """
        kind = type(self.model).__name__
        if kind.endswith("ForTokenClassification"):
            return self._spans(rows)
        return self._answers(rows) if kind.endswith("ForQuestionAnswering") else self._labels(rows)

    def _logits(self, batch: Sequence[Mapping[str, Sequence[int]]]) -> list[Tensor]:
        """Float32 logits of each of the encoded rows, without padding where they are by token."""
        ids, mask = pad_right([each["input_ids"] for each in batch], int(self.tokenizer.pad_token_id or 0))
        inputs = {"input_ids": ids, "attention_mask": mask.long()}
        if "token_type_ids" in batch[0]:
            inputs["token_type_ids"] = pad_right([each["token_type_ids"] for each in batch], 0)[0]
        with torch.no_grad():
            output = self.model(**{name: value.to(self.model.device) for name, value in inputs.items()})
        if hasattr(output, "start_logits"):
            logits = torch.stack([output.start_logits, output.end_logits], dim=-1)
        else:
            logits = output.logits
        logits = logits.float().cpu()
        return [each[: int(size)] if logits.ndim == 3 else each for each, size in zip(logits, mask.sum(1), strict=True)]

    def _check_length(self, ids: Sequence[int]) -> None:
        if len(ids) > self.limit:
            raise BadRow(f"longer than {self.limit} tokens, which the model reads")

    def _spans(self, rows: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
        check_fast(self.tokenizer, str(self.model.name_or_path))
        names = self.model.config.id2label
        scheme = self.manifest.get("scheme") or ("IOB2" if OUTSIDE in names.values() else WORDS)
        encoded = []
        for row in rows:
            text, words = _text_and_words(row, scheme)
            ids, offsets = encode_offsets(self.tokenizer, text)
            self._check_length(ids)
            _, example = align(Tagged(text, words, None, None, ""), [], offsets, scheme)
            encoded.append((ids, example))
        found = self._logits([{"input_ids": ids} for ids, _ in encoded])
        for logits, (_, example) in zip(found, encoded, strict=True):
            best = logits.softmax(dim=-1)[example.places].max(dim=-1)
            labels = [names[index] for index in best.indices.tolist()]
            text, spans = example.row.text, []
            for start, end, label in decode(labels, example.units, scheme):
                inside = [
                    p for p, (s, e) in zip(best.values.tolist(), example.units, strict=True) if s < end and start < e
                ]
                spans.append(_span(text, start, end, label=label, score=sum(inside) / len(inside)))
            prediction = {"predicted_spans": spans}
            if example.row.words is not None:
                said = dict(zip(example.units, labels, strict=True))
                prediction["predicted_tags"] = [said.get(word, OUTSIDE) for word in example.row.words]
            yield prediction

    def _answers(self, rows: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
        check_fast(self.tokenizer, str(self.model.name_or_path))
        settings = READER | {name: value for name, value in self.manifest.get("recipe", {}).items() if name in READER}
        length = min(settings["max_length"], self.limit)
        for row in rows:
            question, context = (_text(row, name) for name in ("question", "context"))
            windows = encode_windows(self.tokenizer, question, context, length, settings["doc_stride"])
            candidates, null = list[Candidate](), float("inf")
            for part in chunks(len(windows), BATCH):
                for logits, (_, places) in zip(self._logits([w for w, _ in windows[part]]), windows[part], strict=True):
                    candidates += best_answers(logits, places, settings["max_answer_length"], NBEST)
                    null = min(null, null_score(logits))
            best = sorted({(c.score, c.start, c.end) for c in candidates}, reverse=True)[:NBEST]
            scores = [score for score, *_ in best] + [null] * bool(self.manifest.get("unanswerable"))
            shares = torch.tensor(scores, dtype=torch.float64).softmax(dim=0).tolist()
            if len(scores) > len(best) and (not best or null > best[0][0]):
                yield {"predicted_answer": {"text": "", "score": shares[-1]}}
            else:
                yield {"predicted_answer": _span(context, *best[0][1:], score=shares[0])}

    def _labels(self, rows: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
        encoder, config = is_encoder(self.model.config), self.model.config
        encoded = []
        for row in rows:
            ids = self.tokenizer(_text(row, "text"), verbose=False)["input_ids"]
            if row.get("text_pair") is not None:
                ids = encode_pair(self.tokenizer, row["text"], _text(row, "text_pair"), encoder)
            ids = ending_once(self.tokenizer, ids) if is_encoder_decoder(config) else ids
            self._check_length(ids)
            encoded.append({"input_ids": ids})
        for logits in self._logits(encoded):
            if config.problem_type == REGRESSION or (config.num_labels == 1 and config.problem_type is None):
                yield {"predicted_label": float(logits[0])}
            elif config.problem_type == MULTI:
                scores = [(config.id2label[i], p) for i, p in enumerate(logits.sigmoid().tolist()) if p > 0.5]
                yield {"predicted_labels": [{"label": label, "score": score} for label, score in scores]}
            else:
                best = logits.softmax(dim=-1).max(dim=-1)
                yield {"predicted_label": config.id2label[int(best.indices)], "score": float(best.values)}


def _span(text: str, start: int, end: int, **more: Any) -> dict[str, Any]:
    return {"start": start, "end": end, "text": text[start:end], **more}


def _text(row: Mapping[str, Any], name: str) -> str:
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        raise BadRow(f"no text in `{name}`")
    return value


def _text_and_words(row: Mapping[str, Any], scheme: str) -> tuple[str, tuple[tuple[int, int], ...] | None]:
    words = row.get("tokens")
    if words is None and scheme != WORDS:
        return _text(row, "text"), None
    if not isinstance(words, list) or not words or not all(isinstance(word, str) and word.strip() for word in words):
        raise BadRow(
            "`tokens` is not a list of words" if words is not None else "no `tokens`: the model tags given words"
        )
    return join_words(words)


def auto_class(stage: str | None, architectures: Sequence[str] | None, path: str) -> Any:
    """The class that loads a model which this stage has trained, or whose configuration names these architectures.

    Raises:
        UserError: it is none that predicts labels, spans or answers.
    """
    name = (architectures or [""])[0]
    kind = stage or next((each for each, (_, ending) in AUTO.items() if name.endswith(ending)), None)
    if kind not in AUTO:
        raise UserError(
            f"align predict: {path}: expected a model of the stages {', '.join(AUTO)}, got "
            f"{f'one of the {stage} stage' if stage else name or 'one without an architecture'}; language models answer in `align evaluate`."
        )
    return AUTO[kind][0]
