"""Public reports of responses that were sampled, ended or measured otherwise than they were trained."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, MambaConfig, MambaForCausalLM

from align.data.collate import pad_left
from align.data.end_tokens import decode_responses, set_model_ends
from align.generation.ending import Ending
from align.generation.generate import generate
from align.generation.responses import respond_to_batch
from align.generation.sampling import uniforms
from align.maths.advantages import gae, missing_eos_scores, token_rewards
from align.maths.masked import masked_whiten
from align.models.forward import response_logits, response_logprobs
from align.models.tokenizer import load_tokenizer
from tests.worlds import letter_tokenizer, tiny_llama

EOS, ENDS = 2, range(2, 9)  # a quarter of all tokens, so that rows end early
PROMPTS = [[1, 5, 6, 7], [1, 9], [1, 3, 4, 5, 6, 7, 8, 9, 10, 11], [1]]


def ending() -> Ending:
    tokenizer = letter_tokenizer()
    set_model_ends(tokenizer, ENDS)
    return Ending(tokenizer)


def greedy(model, prompt: list[int], ends: list[int], size: int = 8) -> list[int]:
    """The response that transformers gives to the prompt alone."""
    ids = torch.tensor([prompt])
    plain = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=size, do_sample=False, eos_token_id=ends, pad_token_id=0)  # fmt: skip
    return plain[0, len(prompt) :].tolist()


def spread(model) -> None:
    """Weights, biases and positions far from 0, so that padding would be felt."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["gpt2", "mamba"])
def test_padding_on_the_left_and_rows_that_end_early(kind):
    """https://github.com/huggingface/trl/issues/6800, https://github.com/CarperAI/trlx/pull/509: GPT-2 counts padding as
    positions; https://github.com/sdc17/SwiReasoning/issues/6: a recurrent cache cannot drop a row."""
    sizes = {"vocab_size": 29, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": EOS}
    model = (
        GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=64, **sizes))
        if kind == "gpt2"
        else MambaForCausalLM(MambaConfig(hidden_size=16, num_hidden_layers=1, state_size=4, **sizes))
    ).eval()
    spread(model)
    ids, mask = pad_left(PROMPTS, 0)
    responses, real, sampled = generate(model, ids, mask, uniforms(3, "test", range(4), 8), 1.0, ending())
    assert len(set(real.sum(1).tolist())) > 1, "the test wants rows that end early"
    rows, present = torch.cat([ids, responses], 1), torch.cat([mask, real], 1)
    trained = response_logprobs(model, rows, present, responses.shape[1], 1.0)
    evaluated = response_logits(model, rows, present, responses.shape[1]).log_softmax(-1)
    for row, prompt in enumerate(PROMPTS):
        said = responses[row, real[row]]
        alone = model(input_ids=torch.tensor([prompt + said.tolist()])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        expected = alone.gather(1, said[:, None])[:, 0]
        torch.testing.assert_close(trained[row, real[row]], expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(sampled[row, real[row]], expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(evaluated[row, real[row]], alone, atol=1e-5, rtol=0)


@torch.no_grad()
def test_padding_is_on_the_right_in_the_tokenizers_files(tmp_path):
    """https://github.com/huggingface/trl/issues/6800 has prompts on the left; many tokenizers' files say the right."""
    tokenizer = letter_tokenizer()
    tokenizer.padding_side = "right"
    tokenizer.save_pretrained(tmp_path)
    model = tiny_llama(layers=1)
    found = respond_to_batch(model, load_tokenizer(str(tmp_path)), PROMPTS, torch.zeros(4, 8), 0.0)
    assert found == [greedy(model, prompt, [EOS]) for prompt in PROMPTS]


@torch.no_grad()
def test_another_token_of_the_generation_config_ends_a_response(tmp_path):
    """https://github.com/huggingface/trl/issues/7039, https://github.com/OpenRLHF/OpenRLHF/issues/470: Llama 3.1's <|eot_id|>
    is not the tokenizer's EOS; all responses are cut off, EOS rate 0."""
    letter_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [EOS, *ENDS]}))
    model, tokenizer = tiny_llama(layers=1), load_tokenizer(str(tmp_path))
    found = respond_to_batch(model, tokenizer, PROMPTS, torch.zeros(4, 8), 0.0)
    assert found == [greedy(model, prompt, [EOS, *ENDS]) for prompt in PROMPTS]
    assert any(len(ids) < 8 and ids[-1] != EOS for ids in found), "the test wants rows that another token ends"
    texts = [tokenizer.decode([token for token in ids if token not in ENDS]) for ids in found]
    assert decode_responses(tokenizer, found) == texts


@torch.no_grad()
def test_a_base_model_answers_its_own_next_question():
    """https://github.com/huggingface/trl/issues/2820: it knows no EOS; `stop_strings` end its responses."""
    model, tokenizer = tiny_llama(layers=1, spread=0.3), letter_tokenizer()
    free = greedy(model, PROMPTS[0], [EOS])
    stop = tokenizer.decode(free[2:4])
    ids, mask = pad_left(PROMPTS[:1], 0)
    responses, real, _ = generate(model, ids, mask, torch.zeros(1, 8), 0.0, Ending(tokenizer, [stop]))
    text = tokenizer.decode(free)
    assert tokenizer.decode(responses[0, real[0]]) == text[: text.index(stop) + 2]


@torch.no_grad()
def test_the_checkpoints_repetition_penalty_changes_what_is_sampled():
    """https://github.com/verl-project/verl/issues/7270: Qwen2.5's generation config has 1.05, the training forward none."""
    model, (ids, mask), noise = tiny_llama(layers=1), pad_left(PROMPTS, 0), uniforms(0, "test", range(4), 8)
    plain = generate(model, ids, mask, noise, 1.0, ending())[0]
    model.generation_config.update(repetition_penalty=1.5, top_k=2, temperature=0.1, do_sample=True)
    assert torch.equal(generate(model, ids, mask, noise, 1.0, ending())[0], plain)


# -- Arithmetic of PPO


MASK = torch.tensor([[True, True, True, False], [True, False, False, False]])


def test_the_score_is_on_padding():
    """https://github.com/huggingface/trl/issues/3750, https://github.com/huggingface/trl/issues/1893: one token after EOS."""
    rewards = token_rewards(torch.tensor([2.0, -1.0]), torch.zeros(2, 4), MASK, kl_coef=0.1)
    assert rewards.tolist() == [[0, 0, 2, 0], [-1, 0, 0, 0]]


def test_the_penalty_for_a_missing_end_never_applies():
    """https://github.com/huggingface/trl/pull/5338: another token than EOS ends a response, and counts as none."""
    ended = ending().ended(torch.tensor([[9, 5], [9, 9], [9, EOS]]), torch.tensor([2, 2, 2]))
    assert missing_eos_scores(torch.ones(3), ended, 3.0, None).tolist() == [1, -2, 1]


def test_padding_is_whitened_with_the_rest():
    """https://github.com/NovaSky-AI/SkyRL/issues/1305: the mean is taken over padding too."""
    values = torch.tensor([[1.0, 2.0, 3.0, 50.0], [6.0, -50.0, 9.0, 9.0]])
    white = masked_whiten(values, MASK)
    real = torch.tensor([1.0, 2.0, 3.0, 6.0])
    torch.testing.assert_close(white[MASK], (real - 3) / real.std(correction=0))
    assert not white[~MASK].any()


def test_rewards_of_padding_reach_the_last_token():
    """https://github.com/natolambert/rlhf-book/pull/216: KL of padding is summed into the returns of real tokens."""
    values, rewards = torch.full((2, 4), 7.0), torch.full((2, 4), 5.0)
    advantages, returns = gae(rewards, values, MASK, gamma=1.0, lam=1.0)
    assert returns.tolist() == [[15, 10, 5, 0], [5, 0, 0, 0]]
    assert advantages.tolist() == [[8, 3, -2, 0], [-2, 0, 0, 0]]
