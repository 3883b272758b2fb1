"""`align predict MODEL ROWS OUTPUT`: write a trained model's spans, answers or labels for the rows of a file."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoModelForSequenceClassification

from align.config.data_source import DataSource, check_source
from align.config.paths import expand, expand_output
from align.data.rows import BadRows
from align.data.sources import read_source
from align.encoders.predict import BATCH, Predictor, auto_class
from align.engine.distributed import connect, disconnect
from align.errors import BadRow, UserError
from align.models.context_length import max_positions
from align.models.inspect_folder import inspect_folder
from align.models.load import adapter_base, load_config, load_pretrained
from align.models.model_types import check_kind
from align.models.tokenizer import load_tokenizer, set_right_padding
from align.runs.files import write_text
from align.runs.quiet import quiet
from align.runs.run_record import read_manifest
from reward_models.bottleneck import bottleneck_settings

KEY = "align predict"
REMEDY = "take them out of the file"  # there is no recipe, and so no key to skip them


def run(model: str, rows: str, output: str, columns: Sequence[str] = ()) -> str:
    """Write each row of the file with what the model predicts, as JSON lines; returns a message.

    Args:
        columns: names of columns, `ours=theirs`.

    Raises:
        UserError: there is no such model or file, rows that the model cannot read, or the output exists.
    """
    quiet()
    path, target = expand(model, KEY), Path(expand_output(output, KEY))
    if os.path.lexists(target):
        raise UserError(f"{target}: exists already; name a new file.")
    renamed = dict(_pair(each) for each in columns)
    source = DataSource(path=expand(rows, KEY), columns=renamed)
    check_source(source, KEY)
    read = _read(source)
    predictor = load(path)
    bad = BadRows()
    lines: list[str] = []
    for first in range(0, len(read), BATCH):
        batch = read[first : first + BATCH]
        for (_, row), found in zip(batch, _predict(predictor, batch, bad), strict=True):
            lines.append(json.dumps({**row, **found}, ensure_ascii=False, default=str) + "\n")
    bad.raise_or_report("error", REMEDY)
    write_text(target, "".join(lines))
    disconnect()
    return f"{target}: {len(read)} rows with predictions"


def _pair(word: str) -> tuple[str, str]:
    ours, equals, theirs = word.partition("=")
    if not equals:
        raise UserError(f"--columns: expected ours=theirs, as in --columns text=sentence, got {word!r}")
    return ours, theirs


def _read(source: DataSource) -> list[tuple[str, Mapping[str, Any]]]:
    """The rows of the file by place, with the columns that were renamed under our names too."""
    found: list[tuple[str, Mapping[str, Any]]] = []
    bad = BadRows()
    for where, row in read_source(source, KEY):
        with bad.catch(where):
            if isinstance(row, BadRow):
                raise row
            if not isinstance(row, Mapping):
                raise BadRow("not a mapping of columns")
            found.append((where, {**row, **{ours: row.get(theirs) for ours, theirs in source.columns.items()}}))
    bad.raise_or_report("error", REMEDY)
    if not found:
        raise UserError(f"{source.path}: expected rows, found none; name a file that holds data.")
    return found


def load(path: str) -> Predictor:
    """The model in `path`, with its tokenizer and what its stage recorded.

    Raises:
        UserError: there is none, or one that predicts neither labels, spans nor answers.
    """
    inspect_folder(path, KEY)
    if adapter_base(path) is not None and bottleneck_settings(path) is None:
        raise UserError(f"{KEY}: {path} is an adapter; name the model beside it, into which the stage has merged it.")
    config, manifest = load_config(path, KEY, encoder_decoder=True), read_manifest(path) or {}
    auto = auto_class(manifest.get("stage"), config.architectures, path)
    check_kind(config, KEY, path, encoder_decoder=auto is AutoModelForSequenceClassification)
    tokenizer = load_tokenizer(path)
    set_right_padding(tokenizer)
    model, report = load_pretrained(auto, path, output_loading_info=True)
    if missing := sorted(report["missing_keys"]):
        raise UserError(
            f"{KEY}: {path}: {missing[0]} is missing, so that it would predict at random; name a trained model."
        )
    limit = min(max_positions(config) or tokenizer.model_max_length, tokenizer.model_max_length)
    return Predictor(model.eval().to(connect(False).device), tokenizer, manifest, limit)


def _predict(
    predictor: Predictor, batch: Sequence[tuple[str, Mapping[str, Any]]], bad: BadRows
) -> list[dict[str, Any]]:
    """What is predicted for the rows; if one of them is bad, each is tried alone, so that all bad ones are named."""
    try:
        return list(predictor.predict([row for _, row in batch]))
    except BadRow:
        found: list[dict[str, Any]] = []
        for where, row in batch:
            found.append({})
            with bad.catch(where):
                found[-1] = next(iter(predictor.predict([row])))
        return found
