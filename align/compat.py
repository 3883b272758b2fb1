"""Every private or undocumented name of transformers, TRL, DeepSpeed and PEFT that this package relies on.

The rest of the package reaches them through this module, which imports the libraries only when asked; a name that has
to be spelt elsewhere, because a subclass overrides it, is listed in `OVERRIDDEN`. `tests/test_compat.py` checks each
of them, so that an upgrade which removes one fails there first.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator
from itertools import accumulate
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

# Methods that subclasses in this package override or call: class -> method -> the parameters that they count on.
OVERRIDDEN: dict[str, dict[str, tuple[str, ...]]] = {
    "transformers.Trainer": {
        "_run_epoch": ("epoch",),
        "_get_train_sampler": ("train_dataset",),
        "_determine_best_metric": ("metrics", "trial"),
        "_save_checkpoint": ("model", "trial"),
        "_get_num_items_in_batch": ("batch_samples", "device"),
        "get_batch_samples": ("epoch_iterator", "num_batches", "device"),
        "create_optimizer": (),
        # Everything that writes or reads a file of a checkpoint.
        "_save": ("output_dir", "state_dict"),
        "_save_optimizer_and_scheduler": ("output_dir",),
        "_save_rng_state": ("output_dir",),
        "_init_training_state": ("max_steps",),
        "_prepare_for_training": ("max_steps", "train_dataloader", "resume_from_checkpoint"),
        "_load_from_checkpoint": ("resume_from_checkpoint", "model"),
        "_load_rng_state": ("checkpoint",),
        "_load_best_model": (),
    },
    "trl.trainer.base_trainer._BaseTrainer": {"_send_telemetry": (), "create_model_card": ()},
    "transformers.cache_utils.DynamicLayer": {
        "update": ("key_states", "value_states"),
        "lazy_initialization": ("key_states", "value_states"),
        "get_seq_length": (),
        "batch_select_indices": ("indices",),
    },
}
# Attributes that TRL's trainers keep their metrics in; our own trainers have them too.
TRAINER_METRICS, TRAINER_TOKENS = "_metrics", "_total_train_tokens"
# The argument by which TRL asks its fused head for log-probabilities instead of logits.
FUSED_HEAD_ARGUMENT = "fused_lm_head"
# Files that DeepSpeed's own CPU collective leaves in /dev/shm.
DEEPSPEED_SHARED_MEMORY_FILES = "deepspeed_allreduce_buffer_*"


# Jinja


def namespace_values(namespace: Any) -> dict[str, Any]:
    """What a template has put into a `namespace()`."""
    values: dict[str, Any] = namespace._Namespace__attrs
    return values


# transformers


def attention_implementation(config: Any) -> str:
    """The attention kernel that a loaded model uses, such as "sdpa"."""
    return str(config._attn_implementation)


def sdpa_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """transformers' "sdpa" attention: query, key, value [B, heads, S, D] -> [B, S, heads, D]."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return sdpa_attention_forward(module, query, key, value, mask, **kwargs)


def register_sdpa_variant(name: str, attention: Callable[..., Any]) -> None:
    """Offer `attention` as an attention implementation that gets the masks of "sdpa"."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, sdpa_mask)


def chat_template_environment() -> Any:
    """A Jinja environment such as transformers renders chat templates in."""
    from transformers.utils import chat_template_utils

    return chat_template_utils._compile_jinja_template("{# limited #}").environment  # one that no other has


def apply_chat_template(tokenizer: Any, messages: Any, compile_template: Callable[[str], Any], **kwargs: Any) -> str:
    """`tokenizer.apply_chat_template` as text, with the template compiled by `compile_template`, once for each render."""
    from transformers.utils import chat_template_utils as utils

    before = utils._compile_jinja_template
    utils._compile_jinja_template = compile_template  # type: ignore[assignment]  # a plain function
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **kwargs))
    finally:
        utils._compile_jinja_template = before


def has_causal_lm(config: Any) -> bool:
    """Whether transformers has a causal language model for this configuration class."""
    from transformers import AutoModelForCausalLM

    return type(config) in AutoModelForCausalLM._model_mapping


def causal_lm_types() -> Collection[str]:
    """Values of `config.model_type` that have a causal language model."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def seq2seq_lm_types() -> Collection[str]:
    """Values of `config.model_type` that have a sequence-to-sequence language model."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES

    return MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES


def masked_lm_types() -> Collection[str]:
    """Values of `config.model_type` that have a masked language model."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    return MODEL_FOR_MASKED_LM_MAPPING_NAMES


def loads_sharded() -> bool:
    """Whether `from_pretrained` shards the weights that it loads now, as under `HfDeepSpeedConfig` with ZeRO-3."""
    from transformers.integrations import is_deepspeed_zero3_enabled

    return bool(is_deepspeed_zero3_enabled())


def stop_sharded_loading() -> None:
    """Have `from_pretrained` load whole models again after a Trainer has trained under ZeRO-3."""
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()


# TRL


def has_fused_head() -> bool:
    """Whether TRL computes log-probabilities in a fused head; 1.14, the last TRL for Python 3.10, has none."""
    import trl.trainer.utils

    return hasattr(trl.trainer.utils, "add_fused_lm_head")


@contextlib.contextmanager
def fused_head_on_label_tokens() -> Iterator[None]:
    """Inside, TRL's fused head computes the label tokens only, as it does by itself where Triton is available."""
    import trl.trainer.utils

    # The head asks this function for nothing else; the kernels look up a name of their own.
    before = trl.trainer.utils._use_triton
    trl.trainer.utils._use_triton = lambda device: True
    try:
        yield
    finally:
        trl.trainer.utils._use_triton = before


def pending_metrics(trainer: Any, mode: str) -> dict[str, list[float]]:
    """The lists whose means a TRL trainer puts into its next log; `mode` is "train" or "eval"."""
    metrics: dict[str, list[float]] = getattr(trainer, TRAINER_METRICS)[mode]
    return metrics


def raise_token_count(trainer: Any, at_least: float) -> None:
    """Raise a TRL trainer's count of the tokens trained on to `at_least`."""
    setattr(trainer, TRAINER_TOKENS, max(getattr(trainer, TRAINER_TOKENS), at_least))


# DeepSpeed: what ZeRO-3 adds to a parameter


def is_sharded(parameter: Any) -> bool:
    """Whether ZeRO-3 shards this parameter, whose own data is then empty outside forward and backward passes."""
    return hasattr(parameter, "ds_id")


def full_shape(parameter: Any) -> torch.Size:
    """Shape of a parameter over all ranks."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


def local_shard(parameter: Any) -> Tensor:
    """This rank's part of a parameter: under ZeRO-3 a flat shard, padded to one size on all ranks; else all of it."""
    shard: Tensor = getattr(parameter, "ds_tensor", parameter).detach()
    return shard


# DeepSpeed: where its optimizers keep what they step


def stepped_parts(optimizer: Any, parameters: Iterable[Any]) -> dict[Any, tuple[Tensor, int, int, int]] | None:
    """Where a DeepSpeed optimizer keeps the float32 weights that this rank steps.

    Returns:
        for each of the parameters of which this rank steps a part: the tensor that is a key of the inner optimizer's
        state, the offset of the part there, its offset in the flattened parameter, and its elements. None for an
        optimizer of torch's own, which steps the parameters themselves.
    """
    parts = {}
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):  # ZeRO 3; the last part of a parameter may be padded
        for parameter in parameters:
            group, offset, count = optimizer.grad_position[optimizer.get_param_id(parameter)]
            start = count * parameter.ds_zero_partition_rank
            held = max(0, min(count, parameter.ds_numel - start))
            parts[parameter] = (optimizer.fp32_partitioned_groups_flat[group], offset, start, held)
    elif hasattr(optimizer, "update_lp_params"):  # ZeRO 1 and 2: each rank steps a range of all weights in a row
        if hasattr(optimizer, "round_robin_bit16_groups"):
            groups, flats = optimizer.round_robin_bit16_groups, optimizer.single_partition_of_fp32_groups
            offsets = optimizer.round_robin_bit16_offsets
        else:  # ZeRO 1 in bfloat16
            groups, flats = optimizer.bf16_groups, optimizer.fp32_groups_flat_partition
            offsets = [[0, *accumulate(weight.numel() for weight in group)][:-1] for group in groups]
        for number, flat in enumerate(flats):
            begin = flat.numel() * optimizer.real_dp_process_group[number].rank()
            for weight, offset in zip(groups[number], offsets[number], strict=True):
                start, end = max(0, begin - offset), min(weight.numel(), begin + flat.numel() - offset)
                if start < end:
                    parts[weight] = (flat, offset + start - begin, start, end - start)
    elif hasattr(optimizer, "fp32_groups"):  # ZeRO 0 in bfloat16
        for weights, masters in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            parts |= {weight: (master, 0, 0, weight.numel()) for weight, master in zip(weights, masters, strict=True)}
    elif hasattr(optimizer, "fp32_groups_flat"):  # the same by DeepSpeed's own Adam
        for weights, flat in zip(optimizer.fp16_groups, optimizer.fp32_groups_flat, strict=True):
            offset = 0
            for weight in weights:
                parts[weight] = (flat, offset, 0, weight.numel())
                offset += weight.numel()
    else:
        return None
    return parts


def splits_state(optimizer: Any) -> bool:
    """Whether each rank steps a part of the weights only, as at ZeRO 1 to 3."""
    return hasattr(optimizer, "fp32_partitioned_groups_flat") or hasattr(optimizer, "update_lp_params")


def copy_stepped_weights(optimizer: Any) -> None:
    """Copy the float32 weights of a DeepSpeed optimizer into those that the model computes with. For all ranks."""
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        optimizer.checkpoint_event_prologue()  # lets go of gathered copies
        for group in range(len(optimizer.fp32_partitioned_groups_flat)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        optimizer.checkpoint_event_epilogue()  # gathers again what stays gathered
    elif hasattr(optimizer, "update_lp_params"):
        optimizer.update_lp_params()
    elif hasattr(optimizer, "fp32_groups"):
        for weights, masters in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            for weight, master in zip(weights, masters, strict=True):
                weight.data.copy_(master.data)
    elif hasattr(optimizer, "fp32_groups_flat"):
        for flat, master in zip(optimizer.fp16_groups_flat, optimizer.fp32_groups_flat, strict=True):
            flat.data.copy_(master.data)


def local_elements(parameter: Any) -> Tensor:
    """The values of a parameter that this rank has; under ZeRO-3 those of its shard, without the padding at its end."""
    shard = local_shard(parameter)
    if not is_sharded(parameter):
        return shard
    import torch.distributed

    begin = torch.distributed.get_rank() * shard.numel()
    return shard.flatten()[: max(0, full_shape(parameter).numel() - begin)]


def disable_deepspeed_shared_memory() -> None:
    """Have DeepSpeed use gloo on CPUs.

    Its own CPU collective saves nothing at our sizes, needs a compiler at the first start, and leaves 69 MB a process
    in shared memory.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


# PEFT


def active_adapter_config(model: Any) -> Any:
    """The configuration of the active adapter of a `PeftModel`."""
    return model.active_peft_config


# bitsandbytes


def keep_differentiable_kernel(module: Any) -> None:
    """Keep a 4-bit layer on a CPU to the one kernel that has a gradient; other modules are left unchanged.

    On a CPU with AVX512-BF16, bitsandbytes repacks a layer in its first evaluation for a bfloat16 kernel without a
    gradient, and training would silently go on with it: the layers below would learn nothing.
    """
    if hasattr(module, "support_avx512bf16_for_cpu"):
        module.support_avx512bf16_for_cpu = False


# sacrebleu


def bleu_statistics(metric: Any, predictions: list[str], references: list[str]) -> list[list[float]]:
    """The statistics of each row from which a sacrebleu metric computes its score of a corpus."""
    rows: list[list[float]] = metric._extract_corpus_statistics(predictions, [references])
    return rows


def bleu_score(metric: Any, statistics: list[int]) -> float:
    """A sacrebleu metric's score of a corpus, from the sums of its rows' statistics."""
    return float(metric._compute_score_from_stats(statistics).score)
