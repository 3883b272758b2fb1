"""`align merge ADAPTER OUTPUT`: merge an adapter into the model that it was trained on."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import (
    AutoPeftModelForCausalLM,
    AutoPeftModelForSeq2SeqLM,
    AutoPeftModelForSequenceClassification,
    PeftModel,
)
from transformers import AutoConfig, AutoTokenizer

from align.cli.merge_folders import adapter_folder
from align.compat.peft import merge_adapter
from align.compat.transformers import write_unchecked
from align.config.paths import expand, expand_output, overlap
from align.errors import UserError, reason
from align.models.check_files import check_files
from align.models.check_weights import check_finite
from align.models.inspect_folder import inspect_folder, read_object
from align.models.load import adapter_base, language_model_class, load_config
from align.models.saved_dtype import set_saved_dtype
from align.models.tokenizer_file import split_as_in_file
from align.runs.files import follow_umask
from align.runs.own_files import remove_empty
from align.runs.quiet import quiet
from reward_models.bottleneck import bottleneck_settings
from reward_models.linear_head import SequenceClassifier

AUTO = {
    "CAUSAL_LM": AutoPeftModelForCausalLM,
    "SEQ_2_SEQ_LM": AutoPeftModelForSeq2SeqLM,
    "SEQ_CLS": AutoPeftModelForSequenceClassification,
}


def run(adapter: str, output: str) -> str:
    """Write the merged model and its tokenizer as a plain Hugging Face folder; returns a message.

    Raises:
        UserError: no adapter, one that cannot be merged, a missing base model, or an output folder that exists.
    """
    quiet()
    adapter, output = expand(adapter, "align merge"), expand_output(output, "align merge")
    folder = adapter_folder(adapter, output)
    inspect_folder(str(folder), "align merge")
    base = adapter_base(str(folder))
    if bottleneck_settings(str(folder)) is not None:
        raise UserError(
            f"{folder}: a bottleneck adapter cannot be merged: it is not linear (it has a ReLU), so no weights of {base} equal it; "
            "name its folder where a recipe asks for a model."
        )
    if base is not None and overlap(output, base):
        raise UserError(
            f"{output}: lies in the folder of the adapter's base model {base}; name a new folder elsewhere."
        )
    task = read_object(folder / "adapter_config.json", "align merge").get("task_type")
    auto = AUTO.get(str(task))
    if auto is None:
        raise UserError(f"{folder}: expected an adapter of {' or '.join(AUTO)}, got {task}.")
    config = load_config(str(folder), "align merge", encoder_decoder=True)  # refuses code that it names
    of_base: Any = SequenceClassifier if task == "SEQ_CLS" else language_model_class(config)
    check_files(of_base, str(folder), "align merge", config, new_head=task == "SEQ_CLS", num_labels=1)
    labels: dict[str, Any] = {"num_labels": 1} if auto is AutoPeftModelForSequenceClassification else {}
    try:
        settings = {"dtype": torch.float32, "use_safetensors": True, "trust_remote_code": False, **labels}
        if labels and base and type(AutoConfig.from_pretrained(base)) not in SequenceClassifier.mapping:
            model = PeftModel.from_pretrained(SequenceClassifier.from_pretrained(base, **settings), str(folder))
        else:
            model = auto.from_pretrained(str(folder), **settings)
        with_tokenizer = (folder / "tokenizer_config.json").is_file()
        source = str(base) if not with_tokenizer else str(folder)
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        split_as_in_file(tokenizer, source)
    except Exception as error:
        raise UserError(f"{folder}: cannot be loaded on its base {base}: {reason(error)}") from error
    check_finite(model, str(folder))
    with new_folder(Path(output)) as fresh:
        merged = merge_adapter(model)
        if getattr(merged, "generation_config", None) is not None:
            write_unchecked(merged.generation_config)
        merged.save_pretrained(fresh)
        dtype = set_saved_dtype(fresh, base, "auto")
        tokenizer.save_pretrained(fresh)
    return f"{folder} merged into {base}: {output}, in {dtype}"


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder that takes the name `path` after the block without an error; otherwise nothing is left.

    Raises:
        UserError: it cannot be made there, or another process has made one in the meantime.
    """
    parent = path.absolute().parent
    missing = [each for each in (parent, *parent.parents) if not each.exists()]
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=parent) as temporary:
            fresh = Path(temporary) / path.name
            fresh.mkdir()
            yield fresh
            follow_umask(fresh.glob("*.safetensors"))
            fresh.rename(path)  # fails if there is something by now, an empty folder excepted
    except BaseException as error:
        remove_empty(missing)
        if isinstance(error, OSError):
            raise UserError(f"{path}: cannot be written ({error.strerror}); choose another folder.") from error
        raise
