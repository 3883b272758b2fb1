"""Sampling against the training forward, and against itself under every way of cutting the batch."""

import copy

import pytest
import torch
from transformers import DynamicCache

from align.data.collate import chunks, pad_left
from align.generation import kv_cache
from align.generation.captured import Captured, cuda_graph
from align.generation.ending import Ending
from align.generation.generate import generate
from align.generation.kv_cache import compaction_order, preallocated_cache
from align.generation.sampling import sample_token, uniforms
from align.models.dropout import disable_dropout
from align.models.forward import position_ids, response_logits, response_logprobs, response_values
from tests.emulated.graph import EmulatedGraph
from tests.worlds import letter_tokenizer, tiny_llama

EOS, PAD = 2, 0
ENDING = Ending(letter_tokenizer())
PROMPTS = [[1, 5, 6, 7], [1, 9], [1, 3, 4, 5, 6, 7, 8, 9], [1, 28, 27, 26], [1], [1, 20, 21]]
LENGTH = 12


@pytest.fixture(scope="module")
def model():
    model = tiny_llama(spread=0.3)
    with torch.no_grad():
        model.lm_head.weight[EOS] *= 2.5  # so that responses end at every length
    return model


def respond(model, prompts, noise, temperature=0.7):
    ids, mask = pad_left(prompts, PAD)
    return ids, mask, *generate(model, ids, mask, noise, temperature, ENDING)[:2]


def test_responses_are_what_the_training_forward_would_sample(model):
    """Cache, left padding, temperature and the dropping of finished rows, all at once: every token is re-derived."""
    noise = uniforms(0, "test", range(60), LENGTH)
    prompts = (PROMPTS * 10)[:60]
    ids, prompt_mask, responses, mask = respond(model, prompts, noise)
    lengths = mask.sum(1)
    assert len(set(lengths.tolist())) > 4, "the test wants responses of many lengths"
    assert 1 in lengths.tolist(), "and one that ends at once"
    with torch.no_grad():
        logits = response_logits(
            model, torch.cat([ids, responses], 1), torch.cat([prompt_mask, mask], 1), responses.shape[1]
        )
    for row, length in enumerate(lengths.tolist()):
        expected = [int(sample_token(logits[row, t][None], noise[row, t][None], 0.7)[0]) for t in range(length)]
        assert responses[row, :length].tolist() == expected
        assert (responses[row, :length] == EOS).sum() == int(EOS in expected)
        assert expected[-1] == EOS or length == LENGTH
        assert (responses[row, length:] == PAD).all()
        assert mask[row].tolist() == [t < length for t in range(mask.shape[1])]


def test_generation_knows_the_log_probability_of_what_it_sampled(model):
    prompts = (PROMPTS * 10)[:60]
    ids, prompt_mask = pad_left(prompts, PAD)
    responses, mask, logprobs = generate(model, ids, prompt_mask, uniforms(0, "test", range(60), LENGTH), 0.7, ENDING)
    with torch.no_grad():
        expected = response_logprobs(
            model, torch.cat([ids, responses], 1), torch.cat([prompt_mask, mask], 1), responses.shape[1], 0.7
        )
    torch.testing.assert_close(logprobs, expected.masked_fill(~mask, 0.0), atol=1e-5, rtol=0)


def test_a_response_does_not_depend_on_its_neighbours(model):
    noise = uniforms(3, "test", range(6), LENGTH)
    *_, together, mask = respond(model, PROMPTS, noise)
    for row, prompt in enumerate(PROMPTS):
        *_, alone, alone_mask = respond(model, [prompt], noise[row : row + 1])
        assert alone[0, alone_mask[0]].tolist() == together[row, mask[row]].tolist()


@pytest.fixture
def _filled_with_nan():
    """Memory that nobody has written holds NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("_filled_with_nan")
class TestRefill:
    """Prompts that wait take the places of responses that have ended."""

    @pytest.fixture(scope="class")
    def whole(self, model):
        return self.decode(model, None)[0]

    @staticmethod
    def decode(model, batch_size, **settings):
        """Responses to 24 prompts, and the model's passes."""
        passes = []
        hook = model.register_forward_hook(lambda *_: passes.append(1))
        prompts = [*pad_left(PROMPTS * 4, PAD), uniforms(0, "test", range(24), LENGTH)]
        prompts = [each.to(model.device) for each in prompts]
        found = generate(model, *prompts, 0.7, ENDING, batch_size=batch_size, **settings)
        hook.remove()
        return found, len(passes)

    @pytest.mark.parametrize("batch_size", [1, 3])
    def test_it_samples_the_same(self, model, whole, batch_size):
        found, passes = self.decode(model, batch_size)
        assert torch.equal(found[0], whole[0])
        assert torch.equal(found[1], whole[1])
        torch.testing.assert_close(found[2], whole[2], rtol=0, atol=1e-4)
        lengths = whole[1].sum(dim=1)
        batches = sum(int(part.max()) for part in lengths.split(batch_size))
        assert passes == batches if batch_size == 1 else passes < 0.9 * batches

    @pytest.mark.parametrize("more", [0, 40])
    def test_ranks_run_as_many_passes(self, model, whole, more):
        """A rank that is done goes on for those that are not, beyond the length of a response."""
        asked = []

        def any_rank_unfinished(unfinished: bool) -> bool:
            asked.append(unfinished)
            return unfinished or asked.count(False) <= more

        found, passes = self.decode(model, 8, any_rank_unfinished=any_rank_unfinished)
        assert passes == len(asked) == self.decode(model, 8)[1] + more
        assert all(torch.equal(there, here) for there, here in zip(found[:2], whole[:2], strict=True))


@pytest.mark.usefixtures("_filled_with_nan")
class TestCaptured:
    """Steps that are operations recorded once, on the same tensors ever after."""

    @pytest.fixture
    def first(self, monkeypatch):
        monkeypatch.setattr(Captured, "works", None)

    @pytest.mark.parametrize("batch_size", [24, 5])
    def test_they_sample_the_same(self, model, first, batch_size, capsys, monkeypatch):
        monkeypatch.setattr(kv_cache, "BLOCK", 5)  # so that the cache grows
        plain, _ = TestRefill.decode(model, batch_size)
        captures = []

        def capture(step):
            replay = EmulatedGraph(step)
            captures.append([])
            return lambda: captures[-1].append(1) or replay()

        found, _ = TestRefill.decode(model, batch_size, capture=capture)
        assert Captured.works
        assert not capsys.readouterr().err
        assert torch.equal(found[0], plain[0])
        assert torch.equal(found[1], plain[1])
        torch.testing.assert_close(found[2], plain[2], rtol=0, atol=1e-4)
        assert max(map(len, captures)) > 3, "most steps are replays"

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
    def test_cuda_graphs_sample_what_plain_steps_do(self, model, first):
        model = copy.deepcopy(model).cuda()
        plain, _ = TestRefill.decode(model, 5)
        found, _ = TestRefill.decode(model, 5, capture=cuda_graph)
        assert Captured.works
        torch.testing.assert_close(found, plain, rtol=0, atol=1e-4)

    @pytest.mark.parametrize(
        ("capture", "why"),
        [
            (lambda step: lambda: 2 * step(), "nats off"),
            (
                lambda step: EmulatedGraph(lambda: step() * float(step().sum() > 0)),
                "RuntimeError: operation not permitted",
            ),
        ],
    )
    def test_without_them_where_they_differ_or_cannot_be(self, model, first, capture, why, capsys):
        plain, _ = TestRefill.decode(model, 5)
        found, _ = TestRefill.decode(model, 5, capture=capture)
        assert all(torch.equal(there, here) for there, here in zip(found[:2], plain[:2], strict=True))
        assert Captured.works is False
        (line,) = capsys.readouterr().err.splitlines()
        assert "decoding without CUDA graphs" in line
        assert why in line


@pytest.mark.parametrize("block", [1, 5, 64])
def test_the_cache_holds_what_transformers_would_however_it_grows(model, block):
    torch.manual_seed(0)
    plain, preallocated = DynamicCache(config=model.config), preallocated_cache(model.config, block)
    kept = torch.tensor([0, 3, 2])
    for step, width in enumerate((4, 1, 1, 3, 1)):
        states = torch.randn(2, 3 if step > 2 else 4, 2, width, 8)
        for got, expected in zip(preallocated.update(*states, 0), plain.update(*states, 0), strict=True):
            torch.testing.assert_close(got, expected, rtol=0, atol=0)
        if step == 2:
            plain.layers[0].batch_select_indices(kept)
            preallocated.layers[0].keep_rows(3, torch.tensor([1]), torch.tensor([3]))


def test_noise_belongs_to_the_response_not_to_the_batch():
    whole = uniforms(7, "train", range(8), 5)
    assert torch.equal(torch.cat([uniforms(7, "train", range(4), 5), uniforms(7, "train", range(4, 8), 5)]), whole)
    assert not torch.equal(uniforms(8, "train", range(8), 5), whole)
    assert not torch.equal(uniforms(7, "evaluation", range(8), 5), whole)
    assert torch.equal(uniforms(7, "train", range(8), 3), whole[:, :3])


def test_sampling_follows_the_tempered_distribution():
    logits = torch.tensor([[2.0, 0.0, -1.0, -30.0]])
    grid = (torch.arange(100_000) + 0.5) / 100_000
    tokens, logprobs = sample_token(logits.expand(100_000, -1), grid, 0.7)
    shares = torch.bincount(tokens, minlength=4) / 100_000
    torch.testing.assert_close(shares, (logits / 0.7).softmax(-1)[0], atol=1e-4, rtol=0)
    torch.testing.assert_close(logprobs, (logits / 0.7).log_softmax(-1)[0][tokens], atol=1e-5, rtol=0)


@pytest.mark.parametrize("vocabulary", [1, 255, 256, 257, 1000])
def test_a_token_is_the_first_whose_cumulative_probability_exceeds_the_noise(vocabulary):
    """Found by blocks, it is the one that the plain definition finds."""
    torch.manual_seed(4)
    logits = 3 * torch.randn(2000, vocabulary)
    noise = torch.rand(2000)
    tokens, logprobs = sample_token(logits, noise, 1.3)
    exact = (logits.double() / 1.3).softmax(-1)
    cumulative = exact.cumsum(-1)
    assert ((cumulative.gather(1, tokens[:, None])[:, 0] - noise) > -1e-6).all()
    below = cumulative.gather(1, tokens[:, None])[:, 0] - exact.gather(1, tokens[:, None])[:, 0]
    assert ((noise - below) > -1e-6).all()
    torch.testing.assert_close(logprobs, exact.log().gather(1, tokens[:, None])[:, 0].float(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("noise", [0.0, 1 - 2**-24])
def test_noise_at_its_ends_still_gives_a_token_that_can_be(noise):
    logits = torch.full((1, 700), -torch.inf)
    logits[0, 300:310] = torch.randn(10)
    (token,) = sample_token(logits, torch.tensor([noise]), 1.0)[0].tolist()
    assert token == (300 if noise == 0 else 309)


def test_temperature_0_takes_the_likeliest():
    logits = torch.tensor([[0.0, 3.0, 1.0]])
    tokens, logprobs = sample_token(logits, torch.tensor([0.999]), 0)
    assert tokens.tolist() == [1]
    torch.testing.assert_close(logprobs, logits.log_softmax(-1)[:, 1])


@pytest.mark.parametrize("alive", ["1", "10", "01", "0001", "10101", "11001110", "111"])
def test_few_rows_move_when_others_end(alive):
    flags = [char == "1" for char in alive]
    order = compaction_order(flags)
    assert sorted(order) == [row for row, flag in enumerate(flags) if flag]
    assert sum(place != row for place, row in enumerate(order)) == flags[: len(order)].count(False)


def test_log_probabilities_do_not_depend_on_padding(model):
    prompt, response = [1, 5, 6, 7], [8, 9, EOS]
    plain = torch.tensor([prompt + response])
    expected = response_logprobs(model, plain, torch.ones_like(plain, dtype=torch.bool), 3, 0.7)
    manual = (model(plain).logits[0, 3:6] / 0.7).log_softmax(-1).gather(1, plain[0, 4:, None])[:, 0]
    torch.testing.assert_close(expected[0], manual, atol=1e-5, rtol=0)
    for pads, junk in ((5, 0), (17, 11), (5, EOS)):
        ids = torch.tensor([[junk] * pads + prompt + response + [junk] * 2])
        mask = torch.tensor([[False] * pads + [True] * 7 + [False] * 2])
        got = response_logprobs(model, ids, mask, 5, 0.7)[:, :3]
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


def test_values_judge_the_state_before_each_token():
    from transformers import LlamaForTokenClassification

    torch.manual_seed(0)
    value = LlamaForTokenClassification(
        tiny_llama().config.__class__(**{**tiny_llama().config.to_dict(), "num_labels": 1})
    ).eval()
    ids = torch.tensor([[1, 5, 6, 7, 8, 9, 2]])
    got = response_values(value, ids, torch.ones_like(ids, dtype=torch.bool), 3)
    for t in range(3):  # what lies after a state cannot change its value
        changed = ids.clone()
        changed[:, 4 + t :] = 20
        again = response_values(value, changed, torch.ones_like(ids, dtype=torch.bool), 3)
        torch.testing.assert_close(again[:, : t + 1], got[:, : t + 1], atol=1e-6, rtol=0)
        torch.testing.assert_close(got[0, t], value(ids[:, : 4 + t]).logits[0, -1, 0], atol=1e-5, rtol=0)


def test_positions_count_real_tokens():
    mask = torch.tensor([[False, False, True, True], [True, True, True, False]])
    assert position_ids(mask).tolist() == [[0, 0, 0, 1], [0, 1, 2, 2]]


def test_chunks_depend_on_the_count_alone():
    assert chunks(7, 3) == [slice(0, 3), slice(3, 6), slice(6, 7)]


def test_dropout_is_off_in_training_mode():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=20)).train()
    ids = torch.randint(0, 20, (2, 6))
    assert not torch.equal(model(ids).logits, model(ids).logits)
    disable_dropout(model)
    assert torch.equal(model(ids).logits, model(ids).logits)
