"""Gradients summed in place: those that autograd makes of the same passes."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from align.config.ppo import PPORecipe
from align.engine.build import train_engine
from align.engine.distributed import World
from align.models.forward import response_loss, response_values
from align.models.in_place_gradients import accumulator_of, add_in_pieces
from tests.models.test_lm_head import batch
from tests.worlds import tiny_llama

ALONE = World(rank=0, size=1, device=torch.device("cpu"))


def recipe(**changes) -> PPORecipe:
    needed = {"output_dir": "out", "sft_model_path": "a", "reward_model_path": "b", "train_dataset": "c"}
    return PPORecipe(**{**needed, "max_grad_norm": 0.0, **changes})


def model(tied=False, padding=True):
    """Some rows of the batch hold the padding token as a real one: its embedding has no gradient if it is `padding_idx`."""
    settings = LlamaConfig(**{**tiny_llama().config.to_dict(), "vocab_size": 30, "tie_word_embeddings": tied})
    torch.manual_seed(0)
    made = LlamaForCausalLM(settings).eval()
    made.model.embed_tokens.padding_idx = 9 if padding else None
    return made


def objective(logprobs, entropy, part):
    return (logprobs * torch.arange(part.start, part.start + len(logprobs)) - 0.1 * entropy).sum() / 20


def gradients(made, backward):
    """Of two microbatches, by name."""
    ids, mask, length, _ = batch()
    for rows in (slice(0, 3), slice(3, 5)):
        loss, _, _ = response_loss(made, ids[rows], mask[rows], length, 0.7, objective)
        backward(loss)
        backward(response_values(made, ids[rows], mask[rows], length).sum())  # logits' first column: a plain pass
    return {name: parameter.grad for name, parameter in made.named_parameters()}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("padding", [False, True])
def test_they_are_those_of_autograd(tied, padding):
    theirs = gradients(model(tied, padding), torch.autograd.backward)
    engine = train_engine(model(tied, padding), recipe(), ALONE, 1e-2, 2)
    assert accumulator_of(engine.module.model.embed_tokens.weight) is engine.module.model.embed_tokens.weight
    ours = gradients(engine.module, engine.backward)
    assert theirs.keys() == ours.keys()
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, atol=1e-6, rtol=1e-5)
    if padding and not tied:
        assert not ours["model.embed_tokens.weight"][9].any()


def test_those_of_bfloat16_weights_go_to_the_float32_ones():
    exact = gradients(model(), torch.autograd.backward)
    engine = train_engine(model(), recipe(bf16=True), ALONE, 1e-2, 2)
    assert all(gradient is None for gradient in gradients(engine.module, engine.backward).values())
    for name, weight in engine.module.named_parameters():
        ours = engine.masters[weight].grad
        assert ours.dtype == torch.float32
        assert nn.functional.cosine_similarity(ours.flatten(), exact[name].flatten(), dim=0) > 0.999, name


def test_a_step_and_a_batch_that_is_discarded_leave_none_behind():
    engine = train_engine(model(), recipe(), ALONE, 1e-2, 2)
    once = {name: gradient.clone() for name, gradient in gradients(engine.module, engine.backward).items()}
    engine.discard()
    for name, gradient in gradients(engine.module, engine.backward).items():
        torch.testing.assert_close(gradient, once[name], atol=0, rtol=0)
    engine.step(0.0)
    assert all(parameter.grad is None for parameter in engine.module.parameters())


def test_a_loss_that_is_scaled_first_is_refused():
    engine = train_engine(model(), recipe(), ALONE, 1e-2, 2)
    ids, mask, length, _ = batch()
    loss, _, _ = response_loss(engine, ids, mask, length, 1.0, objective)
    with pytest.raises(RuntimeError, match="accumulated already"):
        engine.backward(loss * 0.5)


def test_a_pass_without_gradients_adds_none():
    engine = train_engine(model(), recipe(), ALONE, 1e-2, 2)
    ids, mask, length, _ = batch()
    with torch.no_grad():
        response_loss(engine, ids, mask, length, 1.0, objective)
    assert all(parameter.grad is None for parameter in engine.module.parameters())


def test_frozen_weights_are_left_alone():
    adapter = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
    engine = train_engine(get_peft_model(model(), adapter), recipe(), ALONE, 1e-2, 2)
    grown = gradients(engine.module, engine.backward)
    assert {name for name, gradient in grown.items() if gradient is not None} == {
        name for name, parameter in engine.module.named_parameters() if parameter.requires_grad
    }
    assert all("lora" in name for name, gradient in grown.items() if gradient is not None)


def test_an_embedding_that_does_more_than_look_up_is_left_to_autograd():
    made = model()
    made.model.embed_tokens = nn.Embedding(30, 32, scale_grad_by_freq=True)
    engine = train_engine(made, recipe(), ALONE, 1e-2, 2)
    assert accumulator_of(engine.module.model.embed_tokens.weight) is None


def test_adding_in_pieces_adds_everything(monkeypatch):
    monkeypatch.setattr("align.models.in_place_gradients.PIECE", 6)
    total, part = torch.randn(7, 4), torch.randn(7, 4).bfloat16()
    wanted = total + part.float()
    add_in_pieces(total, part)
    assert torch.equal(total, wanted)
