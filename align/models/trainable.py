"""The recipe's `method`: select the trained parameters, by freezing or by PEFT."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from peft import (
    IA3Config,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    PromptTuningInit,
    get_peft_model,
)
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from align.compat.deepspeed import full_shape
from align.config.base import StageRecipe
from align.errors import UserError, first_few, nearest, reason
from align.models.bottleneck import bottleneck_config
from align.models.model_types import is_encoder_decoder

ADAPTABLE = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.MultiheadAttention, Conv1D)
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")  # of configurations
MERGEABLE = ("lora", "dora", "qlora", "ia3")  # methods whose adapter can be merged into the weights


def peft_config(
    recipe: StageRecipe, config: PretrainedConfig, task_type: str, modules_to_save: Sequence[str] = ()
) -> PeftConfig | None:
    """The adapter of the recipe's `method`, without dropout; None for methods without one.

    Args:
        config: of the model that is trained.
        task_type: PEFT's, such as "CAUSAL_LM".
        modules_to_save: names of modules to train in full beside the adapter, such as a new head.
    """
    targets = recipe.lora_target_modules or "all-linear"
    full = list(modules_to_save) or None
    if recipe.method in ("lora", "dora", "qlora"):
        return LoraConfig(
            task_type=task_type,
            r=recipe.lora_r,
            lora_alpha=recipe.lora_alpha,
            lora_dropout=0.0,
            use_dora=recipe.method == "dora",
            target_modules=targets,
            modules_to_save=full,
        )
    if recipe.method == "ia3":
        return IA3Config(task_type=task_type, modules_to_save=full, target_modules=recipe.lora_target_modules or None)
    if recipe.method == "prompt":
        # From token embeddings (arXiv 2104.08691); PEFT's default is noise, many times larger than an embedding.
        return PromptTuningConfig(
            task_type=task_type,
            num_virtual_tokens=recipe.num_virtual_tokens,
            prompt_tuning_init=PromptTuningInit.SAMPLE_VOCAB,
            num_transformer_submodules=1,  # of an encoder-decoder too: PEFT gives its decoder none, whatever their number
        )
    if recipe.method == "prefix":
        return PrefixTuningConfig(
            task_type=task_type,
            num_virtual_tokens=recipe.num_virtual_tokens,
            prefix_projection=recipe.prefix_projection,
            encoder_hidden_size=recipe.encoder_hidden_size or config.get_text_config().hidden_size,
        )
    if recipe.method == "bottleneck":
        return bottleneck_config(
            config,
            size=recipe.bottleneck_size,
            placement=recipe.bottleneck_placement,
            task_type=task_type,
            modules_to_save=modules_to_save,
            trust_remote_code=recipe.trust_remote_code,
        )
    return None


def freeze(
    model: PreTrainedModel,
    head: nn.Module,
    method: str,
    freeze_layers: int = 0,
    trainable_pattern: str | None = None,
    whole: Sequence[str] = (),
) -> None:
    """Freeze what `method: freeze` or `method: head` does not train; other methods change nothing.

    Args:
        head: the output head, which `method: head` trains.
        whole: names of the modules that it trains beside it, such as other parts of the head.

    Raises:
        UserError: the model has fewer layers than that, no parameter matches the pattern, or the head is tied to the
        embedding.
    """
    if method == "head":
        if is_tied(model, head):
            raise UserError(
                "method: head: the model's head is its embedding (tied weights), so training it would change the model's input, too. "
                f"method: freeze with freeze_layers: {min(map(len, _stacks(model)))} trains that weight and what is behind the "
                "layers; method: lora leaves it as it is."
            )
        model.requires_grad_(False)
        for module in (head, *map(model.get_submodule, whole)):
            module.requires_grad_(True)
    elif method == "freeze" and trainable_pattern is not None:
        matching = [p for name, p in model.named_parameters() if re.search(trainable_pattern, name)]
        if not matching:
            some = ", ".join(name for name, _ in list(model.named_parameters())[:4])
            raise UserError(
                f"trainable_pattern: {trainable_pattern!r} matches no parameter; their names are like {some}."
            )
        model.requires_grad_(False)
        for parameter in matching:
            parameter.requires_grad_(True)
    elif method == "freeze":
        stacks = _stacks(model)
        fewest = min(map(len, stacks))
        if freeze_layers > fewest:
            raise UserError(
                f"freeze_layers: expected at most {fewest}, the number of the model's layers, got {freeze_layers}."
            )
        frozen = [layer for layers in stacks for layer in layers[:freeze_layers]]
        if not is_tied(model, model.get_output_embeddings()):
            frozen.append(model.get_input_embeddings())
        for module in frozen:
            module.requires_grad_(False)


def is_tied(model: PreTrainedModel, head: nn.Module | None) -> bool:
    """Whether a head and the model's input embedding are one weight."""
    weight = getattr(head, "weight", None)
    return weight is not None and weight is getattr(model.get_input_embeddings(), "weight", None)


def check_trainable(model: PreTrainedModel, recipe: StageRecipe) -> None:
    """Check that the recipe's `method` fits a model without storage, and its activations can be recomputed if it asks for it.

    Raises:
        UserError: it does not.
    """
    check_target_modules(model, recipe.lora_target_modules)
    if recipe.gradient_checkpointing and not model.supports_gradient_checkpointing:
        raise UserError(
            f"gradient_checkpointing: {type(model).__name__} cannot recompute its activations; leave it out, and lower "
            "per_device_train_batch_size if memory is short."
        )
    head = model.get_output_embeddings() or nn.Identity()
    freeze(model, head, recipe.method, recipe.freeze_layers, recipe.trainable_pattern)
    if recipe.method in (*MERGEABLE, "bottleneck"):
        adapter = peft_config(recipe, model.config, "FEATURE_EXTRACTION")
        assert adapter is not None, recipe.method
        try:
            with torch.device("meta"):
                get_peft_model(model, adapter)
        except ValueError as error:
            raise UserError(f"method: {recipe.method} does not fit this model: {reason(error)}") from error


def without_adapter(model: PreTrainedModel, recipe: StageRecipe) -> list[str]:
    """Names of the weights of experts that an adapter of all linear layers leaves out, since they are in no layer of their own."""
    if recipe.method not in MERGEABLE or recipe.lora_target_modules:
        return []
    config = model.config.get_text_config()
    counts = {getattr(config, name, None) for name in EXPERTS}
    return [
        f"{name}.{weight}"
        for name, module in model.named_modules()
        if not isinstance(module, ADAPTABLE)
        for weight, values in module.named_parameters(recurse=False)
        if values.ndim == 3 and values.shape[0] in counts
    ]


def check_target_modules(model: nn.Module, targets: Sequence[str]) -> None:
    """Check that adapters can be put on each of `lora_target_modules`; PEFT ignores some that it cannot find.

    Raises:
        UserError: the model has no such module, one that takes no adapter, or one on which it would not be trained exactly.
    """
    if not targets:
        return
    modules = dict(model.named_modules())
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[operator]
    tied = getattr(head, "weight", None) is embedding.weight
    for target in targets:
        found = [name for name in modules if name == target or name.endswith(f".{target}")]
        adaptable = {name.rsplit(".", 1)[-1] for name, module in modules.items() if isinstance(module, ADAPTABLE)}
        if not found or not any(isinstance(modules[name], ADAPTABLE) for name in found):
            problem = "takes no adapter" if found else "is not in this model"
            raise UserError(
                f"lora_target_modules: {target!r} {problem}{nearest(target, adaptable)}; name some of "
                f"{first_few(sorted(adaptable))}, or leave the key out for all linear layers."
            )
        outside = model.base_model is not model and not any(
            name.startswith(f"{model.base_model_prefix}.") for name in found
        )
        if outside or (any(modules[name] is embedding for name in found) and tied):
            problem = (
                "belongs to the head, which takes no adapter here" if outside else "is also the head (tied weights)"
            )
            raise UserError(
                f"lora_target_modules: {target!r} {problem}; name modules of the layers, or train it whole by method: freeze "
                "with trainable_pattern."
            )


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """Number of trained parameters and of all parameters, an adapter's included; under ZeRO-3 over all shards."""
    if isinstance(model, PeftModel):  # unpacks 4-bit weights, stored two to a byte
        trained, total = model.get_nb_trainable_parameters()
        return int(trained), int(total)
    sizes = [(full_shape(p).numel(), p.requires_grad) for p in model.parameters()]
    return sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes)


def _stacks(model: PreTrainedModel) -> list[Sequence[nn.Module]]:
    """The transformer blocks, of an encoder-decoder those of the encoder and those of the decoder.

    They are the first `ModuleList` of as many modules as the configuration has layers.
    """
    config = model.config.get_text_config()
    parts = {"": getattr(config, "num_hidden_layers", None)}
    if is_encoder_decoder(config):
        decoders = (getattr(config, name, None) for name in ("decoder_layers", "num_decoder_layers"))
        parts = {"encoder": parts[""], "decoder": next(filter(None, decoders), parts[""])}
    found = [_stack(model, name, count) for name, count in parts.items()]
    if all(found):
        return found
    raise UserError(f"freeze_layers: {type(model).__name__} has no list of layers; use trainable_pattern.")


def _stack(model: nn.Module, part: str, count: int | None) -> Sequence[nn.Module]:
    """The first list of `count` modules in the part of the model; empty if there is none."""
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count and part in name:
            return list(module)
    return []


def add_adapter(
    model: PreTrainedModel, recipe: StageRecipe, task_type: str = "CAUSAL_LM", whole: Sequence[str] = ()
) -> PeftModel:
    """Add the adapter of the recipe's `method`, the only part that trains. It starts as the identity, from the seed.

    Args:
        whole: names of modules that are trained in full beside it, such as a head.
    """
    check_target_modules(model, recipe.lora_target_modules)
    torch.manual_seed(recipe.seed)
    config = peft_config(recipe, model.config, task_type, whole)
    assert config is not None, recipe.method
    adapted = get_peft_model(model, config)
    assert isinstance(adapted, PeftModel)
    return adapted
