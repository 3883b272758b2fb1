"""The head in chunks, on the tokens that count: the same numbers and gradients as the model's own forward pass gives."""

import weakref

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import CohereConfig, CohereForCausalLM, Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel

from align.maths.losses import token_entropy, token_logprobs
from align.models import lm_head as head
from align.models.forward import response_logprobs, response_loss, response_values, scatter_to_mask, strip_padding
from align.models.lm_head import head_is_last, output_head
from tests.worlds import tiny_llama

EOS = 2
SMALL = {"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
         "intermediate_size": 32, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=30, n_embd=16, n_layer=2, n_head=2, n_positions=64)).eval()


def capped():
    torch.manual_seed(0)
    return Gemma2ForCausalLM(Gemma2Config(**SMALL, final_logit_softcapping=0.5, attn_implementation="eager")).eval()


def scaled():
    torch.manual_seed(0)
    return CohereForCausalLM(CohereConfig(**SMALL, logit_scale=3.0)).eval()


def lora(**changes):
    """An adapter that has trained: B is not 0."""
    settings = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "down_proj"], **changes)
    torch.manual_seed(0)
    model = get_peft_model(tiny_llama(spread=0.3), settings).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


MODELS = {"llama": lambda: tiny_llama(spread=0.3), "tied": gpt2, "capped": capped, "scaled": scaled, "lora": lora,
          "lora with its head": lambda: lora(modules_to_save=["lm_head"])}  # fmt: skip


def batch():
    """Prompts of 1 to 6 tokens padded on the left with junk, responses of 1 to 5 on the right, one of which never ends."""
    prompts = [[1, 5, 6, 7, 8, 9], [1], [1, 9], [1, 3, 4], [1, 28, 27, 26, 25]]
    responses = [[8, EOS], [11, 12, 13, 14, 15], [EOS], [7, 7, 7, EOS], [3, 4, EOS]]
    width, length = max(map(len, prompts)), max(map(len, responses))
    pairs = list(zip(prompts, responses, strict=True))
    ids = [[17] * (width - len(p)) + p + r + [EOS] * (length - len(r)) for p, r in pairs]
    mask = [[0] * (width - len(p)) + [1] * (len(p) + len(r)) + [0] * (length - len(r)) for p, r in pairs]
    return torch.tensor(ids), torch.tensor(mask, dtype=torch.bool), length, pairs


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(head, "CHUNK", 120)  # four tokens of 30 logits


def test_rows_are_closed_up():
    ids, mask, length, pairs = batch()
    closed, places, tokens = strip_padding(ids, mask, length)
    assert closed.shape == (5, 8)
    for row, (prompt, response) in enumerate(pairs):
        assert closed[row].tolist() == [*prompt, *response] + [0] * (8 - len(prompt) - len(response))
    expected = [row * 8 + len(p) - 1 + t for row, (p, r) in enumerate(pairs) for t in range(len(r))]
    assert places.tolist() == expected
    assert tokens.tolist() == [token for _, response in pairs for token in response]
    assert scatter_to_mask(tokens, mask[:, -length:]).tolist() == [r + [0] * (length - len(r)) for _, r in pairs]


@pytest.mark.parametrize(
    ("name", "last"), [("llama", True), ("tied", True), ("capped", False), ("scaled", False), ("lora", True)]
)
def test_models_that_change_logits_after_the_head_are_known(name, last):
    assert head_is_last(MODELS[name]()) is last


@pytest.mark.parametrize("name", MODELS)
def test_log_probabilities_are_those_of_each_row_alone(name):
    model = MODELS[name]()
    ids, mask, length, pairs = batch()
    with torch.no_grad():
        got = response_logprobs(model, ids, mask, length, 0.7)
        for row, (prompt, response) in enumerate(pairs):
            logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1] / 0.7
            expected = logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0]
            torch.testing.assert_close(got[row, : len(response)], expected, atol=1e-5, rtol=0)
            assert not got[row, len(response) :].any()
    assert "forward" not in vars(output_head(model)), "the head is its own again"


@pytest.mark.parametrize("entropy_coef", [0.0, 0.3])
@pytest.mark.parametrize("name", MODELS)
def test_the_loss_and_its_gradients_are_those_of_plain_autograd(name, entropy_coef):
    """A loss as PPO's: not linear in the log-probabilities, with another weight for each token."""
    ids, mask, length, pairs = batch()
    real = mask[:, -length:]
    torch.manual_seed(1)
    weights, old = torch.randn(2, int(real.sum()))

    def objective(logprobs, entropy, part):
        return (((logprobs - old[part]).exp() - entropy_coef * entropy) * weights[part]).sum()

    model, plain = MODELS[name](), MODELS[name]()
    loss, logprobs, entropy = response_loss(model, ids, mask, length, 0.7, objective)
    assert not logprobs.requires_grad
    (3 * loss).backward()

    rows = [plain(torch.tensor([p + r])).logits[0, len(p) - 1 : -1] for p, r in pairs]
    tokens = ids[:, -length:][real]
    expected = token_logprobs(torch.cat(rows), tokens, 0.7), token_entropy(torch.cat(rows), 0.7)
    wanted = objective(*expected, slice(None))
    (3 * wanted).backward()
    torch.testing.assert_close(loss, wanted, atol=1e-5, rtol=1e-5)
    for got, want in zip((logprobs, entropy), expected, strict=True):
        torch.testing.assert_close(got, want.detach(), atol=1e-5, rtol=0)
    for (parameter, got), want in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert (want.grad is None) == (not got.requires_grad)
        torch.testing.assert_close(got.grad, want.grad, atol=2e-5, rtol=1e-4, msg=lambda m, n=parameter: f"{n}: {m}")


def test_a_head_with_a_bias_and_a_frozen_one():
    ids, mask, length, _ = batch()

    def objective(logprobs, entropy, part):
        return logprobs.sum()

    model = tiny_llama(spread=0.3)
    model.lm_head.bias = torch.nn.Parameter(torch.randn(model.config.vocab_size))
    response_loss(model, ids, mask, length, 1.0, objective)[0].backward()
    # d sum log p / d bias_v = how often v was the token, less its probabilities: over the vocabulary, 0
    assert abs(float(model.lm_head.bias.grad.sum())) < 1e-5
    assert float(model.lm_head.bias.grad.abs().max()) > 0.1
    frozen = tiny_llama(spread=0.3)
    frozen.lm_head.requires_grad_(False)
    response_loss(frozen, ids, mask, length, 1.0, objective)[0].backward()
    assert frozen.lm_head.weight.grad is None
    assert frozen.model.layers[0].mlp.up_proj.weight.grad.abs().max() > 0


@pytest.mark.parametrize("summed", [1, 240, 2**24])
def test_bfloat16_gives_the_gradient_of_float32_but_for_rounding(monkeypatch, summed):
    monkeypatch.setattr(head, "PRODUCT", summed)  # the weight's gradient in pieces of 4, 8 and all tokens
    ids, mask, length, _ = batch()

    def objective(logprobs, entropy, part):
        return (logprobs.exp() - entropy).sum()

    exact, rounded = tiny_llama(spread=0.3), tiny_llama(spread=0.3).bfloat16()
    for model in (exact, rounded):
        response_loss(model, ids, mask, length, 0.7, objective)[0].backward()
    for (name, ours), theirs in zip(rounded.named_parameters(), exact.parameters(), strict=True):
        assert ours.grad.dtype == torch.bfloat16
        likeness = torch.nn.functional.cosine_similarity(ours.grad.float().flatten(), theirs.grad.flatten(), dim=0)
        assert likeness > 0.99, name


def test_no_more_logits_exist_at_once_than_a_chunk(monkeypatch):
    """The largest tensor that any operation makes, in forward and backward pass."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        rows = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.shape[1:] == (31,) and len(result) != 32:  # 32: the weight
                self.rows = max(self.rows, result.shape[0])
            return result

    model = tiny_llama(vocab_size=31)
    ids, mask, length, _ = batch()
    with Largest() as largest:
        response_loss(model, ids, mask, length, 1.0, lambda logprobs, entropy, part: logprobs.sum())[0].backward()
        response_logprobs(model, ids, mask, length, 1.0)
    assert largest.rows == 120 // 31


def test_large_logits_overflow_nothing():
    """exp of 89 is infinite in float32."""
    model = tiny_llama(spread=0.3)
    ids, mask, length, pairs = batch()
    with torch.no_grad():
        model.lm_head.weight *= 500 / model(ids).logits.abs().max()
        got = response_logprobs(model, ids, mask, length, 1.0)[mask[:, -length:]]
        rows = [model(torch.tensor([p + r])).logits[0, len(p) - 1 : -1] for p, r in pairs]
    expected = token_logprobs(torch.cat(rows), ids[:, -length:][mask[:, -length:]], 1.0)
    assert torch.cat(rows).amax(dim=1).max() > 200
    torch.testing.assert_close(got, expected, atol=1e-3, rtol=0)
    loss, logprobs, _ = response_loss(model, ids, mask, length, 1.0, lambda logprobs, entropy, part: logprobs.sum())
    loss.backward()
    torch.testing.assert_close(logprobs, expected, atol=1e-3, rtol=0)
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_the_memory_of_a_chunk_is_free_for_the_next(monkeypatch):
    chunks = []
    piece = head._piece

    def watched(logits, *rest):
        assert not any(chunk() is not None for chunk in chunks)
        loss, gradient = piece(logits, *rest)
        chunks.extend(map(weakref.ref, (logits, gradient)))
        return loss, gradient

    monkeypatch.setattr(head, "_piece", watched)
    ids, mask, length, _ = batch()
    response_loss(tiny_llama(), ids, mask, length, 1.0, lambda logprobs, entropy, part: logprobs.sum())[0].backward()
    assert len(chunks) == 2 * 4, "15 tokens, four at a time"


def test_values_are_zero_at_padding():
    from transformers import LlamaForTokenClassification

    model = LlamaForTokenClassification(tiny_llama().config).eval()
    ids, mask, length, pairs = batch()
    got = response_values(model, ids, mask, length)
    for row, (prompt, response) in enumerate(pairs):
        expected = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1, 0]
        torch.testing.assert_close(got[row, : len(response)], expected, atol=1e-5, rtol=0)
        assert not got[row, len(response) :].any()
