"""Scores: the trained head, the position it reads, Python functions, and sums. Models are tiny and built from configs."""

import asyncio
import copy
import functools
import math
import threading

import numpy
import peft
import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from reward_models.combine import RewardSum
from reward_models.functions import FunctionReward
from reward_models.heads import init_head, keep_head_float32, score_head, score_sequences
from reward_models.load import load_reward_model
from reward_models.responses import Responses, passes
from reward_models.trained import ModelReward

EOS = 2
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48, "vocab_size": 40}
SPECIAL = {"bos_token_id": 1, "eos_token_id": EOS, "pad_token_id": 0}
DECODERS = ["llama", "gpt2", "bloom", "modernbert-decoder"]
ENCODERS = ["bert", "roberta"]
SEQUENCES = [[1, 7, 8, 9, EOS], [1, 30, 31, 32, 33, 34, 35, 36, EOS], [1, 12, EOS]]


def config(model_type, **changes):
    return AutoConfig.for_model(model_type, **{**SIZES, **SPECIAL, "num_labels": 1, **changes})


@functools.cache
def _states(model_type):
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config(model_type)).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)  # large enough for scores to differ, and biases not zero
    return model.state_dict()


def tiny(model_type="llama", **changes):
    model = AutoModelForSequenceClassification.from_config(config(model_type, **changes)).eval()
    model.load_state_dict(_states(model_type))
    return model


def padded(sequences, pads, side):
    """Ids [B, S] with random garbage, within the vocabulary and not, where the mask [B, S] is False."""
    width = max(map(len, sequences)) + pads
    ids = torch.randint(-9, 60, (len(sequences), width))
    mask = torch.zeros(ids.shape, dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        real = slice(width - len(sequence), width) if side == "left" else slice(0, len(sequence))
        ids[row, real], mask[row, real] = torch.tensor(sequence), True
    return ids, mask


def responses(count=4, **changes):
    fields = {
        "prompts": [f"prompt {row}" for row in range(count)],
        "texts": [f"text {row}" for row in range(count)],
        "completions": [f"response {row}" for row in range(count)],
        "prompt_ids": [[1, 3 + row] for row in range(count)],
        "response_ids": [[10 + row] * (1 + row * 5 % 7) + [EOS] for row in range(count)],
    }
    return Responses(**{**fields, **changes})


# -- the head ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model_type", "name", "changes"),
    [
        ("llama", "score", {}),
        ("gpt2", "score", {}),
        ("bert", "classifier", {}),
        ("roberta", "classifier.out_proj", {}),
        # its experts hold linear layers with one output, which are not the head
        ("qwen2_moe", "score", {"num_experts": 2, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8}),
    ],
)
def test_head_is_found(model_type, name, changes):
    model = AutoModelForSequenceClassification.from_config(config(model_type, **changes))
    found, head = score_head(model)
    assert found == name
    assert head is model.get_submodule(name)
    assert head.out_features == 1


def test_head_of_a_token_classifier_is_found():
    assert score_head(AutoModelForTokenClassification.from_config(config("llama")))[0] == "score"


def test_model_without_a_scalar_head():
    with pytest.raises(ValueError, match="no scalar head in LlamaForCausalLM"):
        score_head(AutoModelForCausalLM.from_config(config("llama")))
    with pytest.raises(ValueError, match="no scalar head"):
        score_head(AutoModelForSequenceClassification.from_config(config("llama", num_labels=2)))


@pytest.mark.parametrize("width", [64, 768, 2048, 4096])
def test_unit_variance_hidden_states_give_unit_variance_scores(width):
    # The score of h ~ N(0, I) has the standard deviation |w|, whose mean square is d / (d + 1).
    model = AutoModelForSequenceClassification.from_config(config("llama", hidden_size=width, num_hidden_layers=0))
    squares = []
    for seed in range(100):
        init_head(model, seed)
        squares.append(model.score.weight.double().square().sum().item())
    assert math.sqrt(sum(squares) / len(squares)) == pytest.approx(math.sqrt(width / (width + 1)), abs=0.02)


def test_head_initialisation_depends_on_its_seed_only():
    first, second = tiny("bert"), tiny("bert")
    torch.manual_seed(1)
    init_head(first, 5)
    torch.manual_seed(2)
    init_head(second, 5)
    assert torch.equal(first.classifier.weight, second.classifier.weight)
    assert first.classifier.bias.tolist() == [0.0]
    init_head(second, 6)
    assert not torch.equal(first.classifier.weight, second.classifier.weight)


def test_bfloat16_scores_do_not_tie():
    model = tiny().bfloat16()
    with torch.no_grad():
        model.score.weight.fill_(1.0)
    hidden = torch.zeros(2, 32, dtype=torch.bfloat16)
    hidden[:, 0], hidden[:, 1] = 5.0, torch.tensor([0.03125, 0.0234375])
    assert model.score(hidden).flatten().tolist() == [5.03125, 5.03125]
    keep_head_float32(model)
    assert model.score(hidden).flatten().tolist() == [5.03125, 5.0234375]
    assert score_sequences(model, *padded(SEQUENCES, 3, "left")).dtype == torch.float32


def test_float32_head_holds_under_autocast_and_trains():
    model = tiny("bert")
    hidden = torch.randn(3, 32)
    exact = model.classifier(hidden)
    names = list(model.state_dict())
    keep_head_float32(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = model.classifier(hidden)
    assert torch.equal(scores, exact)
    scores.sum().backward()
    assert torch.allclose(model.classifier.weight.grad, hidden.sum(dim=0, keepdim=True))
    assert list(model.state_dict()) == names


# -- where the score is read -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", DECODERS + ENCODERS)
def test_score_is_that_of_the_plain_unpadded_model_however_padded(model_type, tmp_path):
    saved = tiny(model_type)
    saved.config.score_mean = 0.25
    saved.save_pretrained(tmp_path)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    with torch.no_grad():
        expected = torch.stack([plain(input_ids=torch.tensor([ids])).logits[0, 0] - 0.25 for ids in SEQUENCES])
    assert expected.std() > 0.01
    model = load_reward_model(str(tmp_path))
    if model_type in DECODERS:
        model.config.pad_token_id = EOS
    for pads in (0, 5, 17):
        for side in ("left", "right"):
            scores = score_sequences(model, *padded(SEQUENCES, pads, side))
            assert scores.shape == (3,)
            assert (scores - expected).abs().max() < 1e-5, (pads, side)


def test_last_real_token_is_read_also_when_every_token_is_the_pad_token():
    model = tiny(pad_token_id=7)
    ids, mask = padded([[7, 7, 7], [9, 7, 7, 7]], 2, "right")
    expected = score_sequences(tiny(pad_token_id=39), ids, mask)
    assert torch.equal(score_sequences(model, ids, mask), expected)


def test_score_without_a_mean_is_the_logit_and_gradients_flow():
    model = tiny().train()
    ids, mask = padded(SEQUENCES, 0, "right")
    scores = score_sequences(model, ids[:1, :5], mask[:1, :5])
    assert torch.allclose(scores, model(input_ids=ids[:1, :5]).logits[:, 0])
    scores.sum().backward()
    assert model.score.weight.grad.abs().sum() > 0
    assert model.model.embed_tokens.weight.grad[SEQUENCES[0]].abs().sum() > 0


def test_head_computes_one_position_and_no_hook_stays():
    model = tiny()
    widths = []
    probe = model.score.register_forward_pre_hook(lambda _, args: widths.append(args[0].shape))
    score_sequences(model, *padded(SEQUENCES, 5, "left"))
    probe.remove()
    assert not model.score._forward_pre_hooks
    assert not model.score._forward_hooks
    with pytest.raises(IndexError):
        score_sequences(model, torch.tensor([[99]]), torch.tensor([[True]]))
    assert not model.score._forward_pre_hooks
    assert not model.score._forward_hooks


class Engine(nn.Module):
    """Wraps a model as DeepSpeed does: its own forward must be the one that is called, `config` is not the model's."""

    def __init__(self, module):
        super().__init__()
        self.module, self.config, self.calls = module, {"zero_optimization": {"stage": 3}}, 0

    @property
    def device(self):
        return self.module.device

    def forward(self, **inputs):
        self.calls += 1
        return self.module(**inputs)


def test_wrapped_models_are_called_through_their_wrapper():
    ids, mask = padded(SEQUENCES, 5, "left")
    expected = score_sequences(tiny(), ids, mask)
    engine = Engine(tiny())
    assert torch.equal(score_sequences(engine, ids, mask), expected)
    assert engine.calls == 1


def test_adapters_leave_the_head_in_its_place():
    ids, mask = padded(SEQUENCES, 5, "left")
    model = tiny()
    keep_head_float32(model)
    expected = score_sequences(model, ids, mask)
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS", target_modules="all-linear"))
    scores = score_sequences(adapted, ids, mask)
    assert torch.allclose(scores, expected)
    scores.sum().backward()
    name, head = score_head(adapted)
    assert name == "score.modules_to_save.default"
    assert head.weight.grad.abs().sum() > 0
    merged = adapted.merge_and_unload()
    assert score_head(merged)[0] == "score"
    assert torch.allclose(score_sequences(merged, ids, mask), expected)


def test_row_without_a_token():
    with pytest.raises(ValueError, match="row 1: no real token"):
        score_sequences(tiny(), torch.zeros(2, 3, dtype=torch.int64), torch.tensor([[True] * 3, [False] * 3]))


# -- loading -----------------------------------------------------------------------------------------------------------


def test_loaded_model_is_frozen_and_ready(tmp_path):
    tiny("gpt2", pad_token_id=None).save_pretrained(tmp_path)
    model = load_reward_model(str(tmp_path), dtype=torch.bfloat16)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.dtype == torch.bfloat16
    assert not model.config.use_cache
    assert model.score(torch.zeros(1, 32, dtype=torch.bfloat16)).dtype == torch.float32
    assert score_sequences(model, *padded(SEQUENCES, 2, "left")).shape == (3,)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: AutoModelForCausalLM.from_config(config("llama")), "LlamaForCausalLM, which has no sequence class"),
        (lambda: AutoModelForTokenClassification.from_config(config("llama")), "LlamaForTokenClassification, which"),
        (lambda: AutoModelForSequenceClassification.from_config(config("llama", num_labels=2)), "with 2 labels"),
    ],
)
def test_folder_without_a_scalar_head_is_refused_before_its_weights_are_read(build, message, tmp_path):
    build().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=f"{tmp_path}.*{message}.*run the reward stage"):
        load_reward_model(str(tmp_path))


def test_missing_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere: no model there.*run the reward stage"):
        load_reward_model(str(tmp_path / "nowhere"))


def test_weights_that_do_not_fit_are_refused(tmp_path):
    model = tiny()
    state = model.state_dict()
    del state["score.weight"]
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match=r"weights do not fit LlamaForSequenceClassification \(score"):
        load_reward_model(str(tmp_path))


# -- a trained model as a source ---------------------------------------------------------------------------------------


def one_by_one(model, sequences):
    return torch.stack(
        [score_sequences(model, torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.bool))[0] for ids in sequences]
    )


def test_model_reward_scores_the_policys_ids_in_order():
    model, batch = tiny(pad_token_id=EOS), responses(7)
    source = ModelReward("model", model, batch_size=3, max_length=64)
    expected = one_by_one(model, [p + r for p, r in zip(batch.prompt_ids, batch.response_ids, strict=True)])
    scores = source.score(batch)
    assert (scores - expected).abs().max() < 1e-5
    assert scores.unique().numel() == 7
    assert not scores.requires_grad
    assert source.truncated == 0


def test_forward_passes_depend_on_the_number_of_rows_only():
    for lengths in ([1] * 7, [1, 50, 2, 60, 3, 61, 62]):
        engine = Engine(tiny())
        batch = responses(7, response_ids=[[9] * length for length in lengths])
        ModelReward("model", engine, batch_size=3, max_length=32).score(batch)
        assert engine.calls == 3


def test_another_tokenizer_gets_text():
    model, batch = tiny("bert"), responses(4)
    ids = {"text 0": [3, 5, 4], "text 1": [3, 6, 7, 4], "text 2": [3, 8, 4], "text 3": [3, 9, 9, 9, 4]}

    def encode(prompt, text, tools):
        assert tools is None
        assert prompt == f"prompt {text[-1]}"
        return ids[text]

    scores = ModelReward("encoder", model, batch_size=2, max_length=64, encode=encode).score(batch)
    assert (scores - one_by_one(model, list(ids.values()))).abs().max() < 1e-5


def test_long_sequences_keep_first_token_and_end_and_are_counted():
    model = tiny()
    batch = responses(2, prompt_ids=[[1, 20, 21, 22], [1]], response_ids=[[23, 24, EOS], [25, 26, EOS]])
    source = ModelReward("model", model, batch_size=2, max_length=4)
    expected = one_by_one(model, [[1, 23, 24, EOS], [1, 25, 26, EOS]])
    assert (source.score(batch) - expected).abs().max() < 1e-5
    assert source.truncated == 1
    source.score(batch)
    assert source.truncated == 2


def test_model_without_a_finite_score_names_the_row():
    model = tiny()
    with torch.no_grad():
        model.model.embed_tokens.weight[12] = float("nan")
    message = r"reward 'model', row 2 of 4: the model's score is nan.*; prompt: 'prompt 2'; response: 'response 2'"
    with pytest.raises(ValueError, match=message):
        ModelReward("model", model, batch_size=4, max_length=64).score(responses(4))
    with pytest.raises(ValueError, match="row 1 of 4: no token"):
        ModelReward("m", model, batch_size=4, max_length=9, encode=lambda p, t, _: [5] * (t != "text 1")).score(
            responses()
        )


# -- Python functions --------------------------------------------------------------------------------------------------


def test_function_is_called_as_trl_calls_it():
    prompts = [[{"role": "user", "content": f"question {row}"}] for row in range(2)]
    completions = [[{"role": "assistant", "content": "a" * (row + 3)}] for row in range(2)]
    batch = responses(2, prompts=prompts, completions=completions, columns={"answer": [7, 8]})

    def function(completions, answer, **kwargs):
        assert kwargs == {"prompts": prompts, "completion_ids": batch.response_ids}
        return [len(turns[0]["content"]) + right for turns, right in zip(completions, answer, strict=True)]

    scores = FunctionReward("length", function).score(batch)
    assert scores.dtype == torch.float32
    assert scores.tolist() == [10.0, 12.0]


async def slow(completions, **kwargs):
    return [float(len(completions)) for _ in completions]


@pytest.mark.parametrize(
    "function",
    [
        slow,
        lambda **kwargs: torch.full((4,), 4.0, dtype=torch.bfloat16),
        lambda **kwargs: numpy.full(4, 4.0, dtype=numpy.float32),
        lambda **kwargs: [torch.tensor(4.0), numpy.float64(4), 4, 4.0],
        lambda **kwargs: (4 for _ in range(4)),
        lambda **kwargs: torch.full((4, 1), 4.0, requires_grad=True),
        lambda **kwargs: numpy.full((4, 1), 4),
    ],
)
def test_forms_in_which_scores_may_be_returned(function):
    assert FunctionReward("four", function).score(responses(4)).tolist() == [4.0] * 4


def test_yes_and_no_are_one_and_zero():
    for returned in ([True, False], numpy.array([True, False]), torch.tensor([True, False])):
        assert FunctionReward("right", lambda returned=returned, **kwargs: returned).score(responses(2)).tolist() == [
            1,
            0,
        ]


def test_a_function_may_change_what_it_is_given():
    messages = [[{"role": "user", "content": f"question {row}"}] for row in range(3)]
    batch = responses(3, prompts=messages, columns={"answer": [[1], [2], [3]], "key": [{"a": [1]}] * 3})
    before = copy.deepcopy(batch)

    def greedy(prompts, completions, completion_ids, answer, key, **kwargs):
        scores = [float(len(ids)) for ids in completion_ids]
        prompts[0][0]["content"] = answer[0][0] = key[0]["a"][0] = "mine"
        for given in (prompts, completions, completion_ids[1], completion_ids, answer):
            given.clear()
        return scores

    sources = [FunctionReward(name, greedy) for name in ("one", "two")]
    scores = RewardSum(sources).score(batch)[1]
    assert scores["one"].tolist() == scores["two"].tolist() == [len(ids) for ids in batch.response_ids]
    assert batch == before


def test_what_cannot_be_copied_is_given_as_it_is():
    thread_lock = threading.Lock()
    batch = responses(1, columns={"audio": [thread_lock]})
    assert FunctionReward("same", lambda audio, **kwargs: [audio[0] is thread_lock]).score(batch).tolist() == [1]


def test_no_way_of_ending_goes_without_a_word():
    def leaves(**kwargs):
        raise SystemExit(0)

    async def cancelled(**kwargs):
        raise asyncio.CancelledError

    with pytest.raises(ValueError, match="reward 'judge', row 0 of 4: SystemExit: 0; prompt: "):
        FunctionReward("judge", leaves).score(responses(4))
    with pytest.raises(ValueError, match="reward 'judge', row 0 of 4: CancelledError"):
        FunctionReward("judge", cancelled).score(responses(4))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("0.5", "returned '0.5'; expected a finite number"),
        (float("nan"), "returned nan; expected a finite number"),
        (-float("inf"), "returned -inf; expected a finite number"),
        (1e39, r"returned 1e\+39; expected a finite number"),  # infinite in float32
        ([1.0], r"returned \[1.0\]; expected a finite number"),
        (10**400, r"returned 10+ \.\.\.; expected a finite number"),
        (1j, "returned 1j; expected a finite number"),
        (torch.tensor([1.0, 2.0]), r"returned tensor\(\[1., 2.\]\); expected"),
    ],
)
def test_wrong_score_names_function_row_prompt_and_response(wrong, message):
    source = FunctionReward("rule", lambda **kwargs: [1.0, 2.0, wrong, 4.0])
    with pytest.raises(
        ValueError, match=rf"reward 'rule', row 2 of 4: {message}.*; prompt: 'prompt 2'; response: 'response 2'"
    ):
        source.score(responses(4))


class TestTokenRewards:
    batch = responses(3, response_ids=[[5, 6, 2], [7, 2], [8]])

    def test_one_number_per_token(self):
        source = FunctionReward("dense", lambda completion_ids, **kwargs: [[0.5] * len(ids) for ids in completion_ids])
        assert source.score(self.batch).tolist() == [[0.5, 0.5, 0.5], [0.5, 0.5, 0.0], [0.5, 0.0, 0.0]]

    def test_they_join_the_sum_with_their_weight(self):
        dense = FunctionReward("dense", lambda **kwargs: [[1.0, 2.0, 3.0], None, torch.tensor([4.0]).tolist()])
        plain = FunctionReward("plain", lambda **kwargs: [10.0, 20.0, 30.0])
        total, scores, tokens = RewardSum([dense, plain], [2.0, 0.5]).score(self.batch)
        assert total.tolist() == [17.0, 10.0, 23.0]
        assert scores["dense"].nan_to_num(-1).tolist() == [6.0, -1.0, 4.0]
        assert tokens.tolist() == [[2.0, 4.0, 6.0], [0.0, 0.0, 0.0], [8.0, 0.0, 0.0]]

    def test_without_them_tokens_have_nothing(self):
        plain = FunctionReward("plain", lambda **kwargs: [10.0, 20.0, 30.0])
        assert RewardSum([plain]).score(self.batch)[2].tolist() == [[0.0] * 3] * 3

    def test_another_number_than_tokens_is_an_error(self):
        source = FunctionReward("dense", lambda **kwargs: [[1.0, 2.0, 3.0], [1.0], [1.0]])
        with pytest.raises(ValueError, match=r"row 1 of 3: returned 1 numbers; expected one for each of its 2 tokens"):
            source.score(self.batch)

    def test_none_for_a_token_is_an_error(self):
        source = FunctionReward("dense", lambda **kwargs: [[1.0, None, 3.0], [1.0, 1.0], [1.0]])
        with pytest.raises(ValueError, match=r"row 0 of 3: returned None for a token"):
            source.score(self.batch)


def test_exception_names_the_row_that_causes_it():
    def function(completions, limit, **kwargs):
        return [1 / (most - int(text[-1])) for text, most in zip(completions, limit, strict=True)]

    message = (
        r"reward 'rule', row 3 of 4: ZeroDivisionError: division by zero; prompt: 'prompt 3'; response: 'response 3'"
    )
    with pytest.raises(ValueError, match=message) as caught:
        FunctionReward("rule", function).score(responses(4, columns={"limit": [5, 4, 3, 3]}))
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_exception_of_the_whole_batch_is_not_pinned_on_a_row():
    def function(completions, **kwargs):
        if len(completions) > 1:
            raise KeyError("too many")
        raise RuntimeError("too few")

    with pytest.raises(ValueError, match=r"reward 'rule': KeyError: 'too many' \(on 4 rows together"):
        FunctionReward("rule", function).score(responses(4))


def test_wrong_number_of_scores_and_no_list():
    with pytest.raises(ValueError, match="reward 'rule': returned 3 scores for 4 responses"):
        FunctionReward("rule", lambda **kwargs: [1.0] * 3).score(responses(4))
    for returned in (1.0, None, "1234", b"1234", {"a": 1}, {1.0, 2.0, 3.0, 4.0}):
        with pytest.raises(ValueError, match=r"reward 'rule', row 0 of 4: TypeError: it returned .* expected a list"):
            FunctionReward("rule", lambda returned=returned, **kwargs: returned).score(responses(4))


def test_error_shows_the_ends_of_a_long_text():
    batch = responses(1, prompts=["begin" + "x" * 1000 + "end"])
    with pytest.raises(ValueError, match=r"'beginx+ \.\.\. x+end'") as caught:
        FunctionReward("rule", lambda **kwargs: ["?"]).score(batch)
    assert len(str(caught.value)) < 700


# -- sums --------------------------------------------------------------------------------------------------------------


def test_weighted_sum_by_hand():
    one = FunctionReward("one", lambda **kwargs: [1.0, 2.0, 3.0])
    two = FunctionReward("two", lambda **kwargs: [10.0, 0.0, -10.0])
    total, scores, _ = RewardSum([one, two], [2.0, -0.5]).score(responses(3))
    assert total.tolist() == [-3.0, 4.0, 11.0]
    assert {name: values.tolist() for name, values in scores.items()} == {"one": [1, 2, 3], "two": [10, 0, -10]}
    assert RewardSum([one, two]).score(responses(3))[0].tolist() == [11.0, 2.0, -7.0]


def test_none_is_left_out_of_the_sum():
    one = FunctionReward("one", lambda **kwargs: [None, 2.0, 3.0])
    two = FunctionReward("two", lambda **kwargs: [10.0, None, 0.0])
    total, scores, _ = RewardSum([one, two], [2.0, 1.0]).score(responses(3))
    assert total.tolist() == [10.0, 4.0, 6.0]
    assert scores["one"].nanmean() == 2.5
    assert scores["one"].isnan().tolist() == [True, False, False]


def test_row_that_no_source_scores():
    sources = [FunctionReward(name, lambda **kwargs: [1.0, None]) for name in ("one", "two")]
    with pytest.raises(ValueError, match=r"reward 'one \+ two', row 1 of 2: returned None.*; prompt: 'prompt 1'"):
        RewardSum(sources).score(responses(2))


def test_sum_that_cannot_be():
    one = FunctionReward("one", lambda **kwargs: [1.0])
    with pytest.raises(ValueError, match="expected one or more"):
        RewardSum([])
    with pytest.raises(ValueError, match=r"with distinct names, got \['one', 'one'\]"):
        RewardSum([one, one])
    for weights in ([1.0, 2.0], [], [float("nan")]):
        with pytest.raises(ValueError, match="reward weights: expected a finite number for each of"):
            RewardSum([one], weights)


@pytest.mark.parametrize(
    ("lengths", "most", "expected"),
    [
        ([3], 16, [[0]]),
        ([1, 9, 5], 2, [[1, 2], [0]]),
        ([5] * 8, 16, [list(range(8))]),  # too few to be worth four passes
        (list(range(40)), 32, [list(range(39 - 10 * i, 29 - 10 * i, -1)) for i in range(4)]),
        (list(range(40)), 4, [list(range(39 - 4 * i, 35 - 4 * i, -1)) for i in range(10)]),
    ],
)
def test_passes_take_rows_of_like_length_together(lengths, most, expected):
    assert passes(lengths, most) == expected
