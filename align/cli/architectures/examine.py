"""One row of the matrix: measure a model folder, and run the stages on it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from transformers import AutoTokenizer, GenerationConfig

from align.cli.architectures.cases import Case, write_small_model
from align.cli.architectures.exactness import measure_policy, measure_scores, response_room
from align.cli.architectures.pairs import check_answers, measure_pair_scores, measure_pairs, write_pair_recipes
from align.cli.architectures.stages import check_generates, check_recipes, ppo_models, run_recipe, write_recipes
from align.errors import UserError, reason
from align.models.context_length import max_positions
from align.models.load import load_config
from align.models.model_types import is_encoder_decoder
from align.models.packing import check_packing
from align.models.small_model import small_model
from align.models.tokenizer import load_tokenizer

LIMIT = 1e-5  # nats, and units of score, of small models in float32 ...
OWN_LIMIT = 1e-4  # ... and of a user's, whose depth and sharper distributions round more
LARGE = 100_000_000  # parameters, above which the stages run on a small model of the same configuration
OK, REFUSED, FAILED = "ok", "refused", "FAILED"
STAGES = ("sft", "reward", "ppo")
PARTS = ("model", "packing", "exact", "check", *STAGES, "scores", "saved")  # in their order


@dataclass(slots=True)
class Examination:
    """The results for one architecture.

    Attributes:
        stages: by stage, and `packing` and `saved`: OK; REFUSED, by `align check` too; or FAILED.
        gaps: largest differences from plain transformers, in nats (`scores`, `values`: in units of the score).
        limit: that no gap may be above.
        notes: the reason for each part that is refused or has failed.
    """

    name: str
    limit: float = LIMIT
    stages: dict[str, str] = field(default_factory=dict)
    gaps: dict[str, float] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    tell: ClassVar[Callable[[str], None]] = staticmethod(lambda part: None)  # called at the start of each part

    @property
    def verdict(self) -> str:
        """FAILED; REFUSED if a stage is, while packing may be; or OK."""
        if FAILED in self.stages.values() or any(gap > self.limit for gap in self.gaps.values()):
            return FAILED
        return REFUSED if any(self.stages.get(stage) == REFUSED for stage in STAGES) else OK

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "verdict": self.verdict}

    @contextlib.contextmanager
    def part(self, name: str, refused: str = "") -> Iterator[None]:
        """A part that may fail; `refused`: what `align check` found, so that an error here is a refusal."""
        self.stages[name] = OK
        type(self).tell(name)
        try:
            yield
        except Exception as error:
            is_user_error = isinstance(error, UserError)
            self.stages[name] = REFUSED if is_user_error and refused else FAILED
            self.notes[name] = str(error) if is_user_error else reason(error)


def examine(case: Case, folder: Path, overrides: Sequence[str] = ()) -> Examination:
    """Measure one case and run its stages, in `folder`. Errors become notes."""
    began, found = time.monotonic(), Examination(case.name, OWN_LIMIT if case.folder else LIMIT)
    base = case.folder or str(folder / "base")
    with found.part("model"):
        if case.folder is None:
            write_small_model(case.name, folder / "base")
        config, tokenizer = load_config(base, "--model", encoder_decoder=True), load_tokenizer(base)
        if is_encoder_decoder(config):
            _examine_pairs(found, base, folder, overrides)
            return _finished(found, began)
        with found.part("packing", refused="by check_packing"):
            check_packing(config, "packing", trust_remote_code=False)
        packs = found.stages["packing"] == OK
        rows, parameters = None, 0
        with found.part("exact"):
            rows, gaps, parameters = measure_policy(base, tokenizer, packs)
            found.gaps |= gaps
        start = base
        if parameters > LARGE:
            start = write_small_copy(base, folder / "small")
            found.notes["stages"] = f"on a small random model of this configuration: it has {parameters:,} parameters"
        run_stages(found, start, folder, packs, rows, overrides)
    return _finished(found, began)


def _finished(found: Examination, began: float) -> Examination:
    if found.stages.pop("model") == FAILED:
        found.stages["exact"] = FAILED
    found.seconds = round(time.monotonic() - began, 1)
    return found


def _examine_pairs(found: Examination, base: str, folder: Path, overrides: Sequence[str]) -> None:
    """The same of an encoder-decoder, which PPO does not train and which packs no rows."""
    found.stages |= {"packing": REFUSED, "ppo": REFUSED}
    found.notes["ppo"] = (
        "an encoder-decoder, which PPO does not sample from: sft, mlm, classify, reward and evaluate take it"
    )
    parameters = 0
    with found.part("exact"):
        gaps, parameters = measure_pairs(base)
        found.gaps |= gaps
    if parameters > LARGE:
        base = write_small_copy(base, folder / "small")
    write_pair_recipes(base, folder)
    mistakes = ""
    with found.part("check"):
        mistakes = check_recipes(folder, overrides)
    for stage in ("sft", "reward"):
        with found.part(stage, refused=mistakes):
            run_recipe(stage, folder, overrides)
        if found.stages["sft"] != OK:
            return
    with found.part("saved"):
        check_answers(str(folder / "sft"))
    if found.stages["reward"] == OK:
        with found.part("scores"):
            found.gaps |= measure_pair_scores(str(folder / "reward"))


def run_stages(found: Examination, base: str, folder: Path, packs: bool, rows: Any, overrides: Sequence[str]) -> None:
    """The three stages one after the other, as far as they go; then what the folders that they saved hold."""
    config = load_config(base, "--model")
    write_recipes(base, folder, packs, max_positions(config))
    mistakes = ""
    with found.part("check"):
        mistakes = check_recipes(folder, overrides)
    for stage in STAGES:
        with found.part(stage, refused=mistakes):
            run_recipe(stage, folder, overrides)
        if found.stages[stage] != OK:
            return
    if mistakes:
        found.stages["check"], found.notes["check"] = FAILED, f"would not run, but did: {mistakes}"
    if rows is not None:
        with found.part("scores"):
            found.gaps |= measure_scores(ppo_models(folder, overrides), str(folder / "reward"), rows)
        with found.part("saved"):
            check_generates(str(folder / "ppo"), rows.prompts, response_room(config, 8))


def write_small_copy(base: str, folder: Path) -> str:
    """Write a small random model of the configuration in `base`, with its tokenizer; returns its folder."""
    config = load_config(base, "--model", encoder_decoder=True)
    text = config.get_text_config()
    model = small_model(config, text.vocab_size)
    names = ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id")
    ids = {name: getattr(text, name) for name in names if hasattr(text, name)}
    model.config.update(ids)
    try:
        model.generation_config = GenerationConfig.from_pretrained(base)
    except OSError:  # it has none
        model.generation_config = GenerationConfig(**ids)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return str(folder)
