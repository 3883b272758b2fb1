"""Lists of response ids against the padded tensors that `generate` returns, and over ranks."""

from __future__ import annotations

import torch

from align.data.collate import pad_left
from align.engine.distributed import World
from align.generation.ending import Ending
from align.generation.generate import generate
from align.generation.responses import gather_responses, respond_to_batch, unpadded
from align.generation.sampling import uniforms
from tests.worlds import letter_tokenizer, tiny_llama

PROMPTS = [[1, 5, 6, 7], [1, 9], [1, 3, 4, 5, 6, 7, 8, 9]]


class TwoRanks(World):
    """Rank 0 of two, where the other rank holds the same."""

    def gather(self, tensor):
        assert tensor.shape == (3, 4), "ranks gather tensors of one shape"
        return torch.cat([tensor, tensor])


def test_a_batch_is_what_generate_samples_without_padding():
    model, tokenizer, noise = tiny_llama(spread=0.3), letter_tokenizer(), uniforms(0, "test", range(3), 20)
    ids, prompt_mask = pad_left(PROMPTS, tokenizer.pad_token_id)
    padded, mask, _ = generate(model, ids, prompt_mask, noise, 0.7, Ending(tokenizer))
    responses = respond_to_batch(model, tokenizer, PROMPTS, noise, 0.7)
    assert [len(response) for response in responses] == mask.sum(dim=1).tolist()
    for row, response in enumerate(responses):
        assert response == padded[row, : len(response)].tolist()


def test_padding_is_left_out_whatever_its_id():
    ids = torch.tensor([[4, 2, 2], [5, 6, 7]])
    assert unpadded(ids, torch.tensor([[True, True, False], [True] * 3])) == [[4, 2], [5, 6, 7]]


def test_gathered_responses_keep_their_order_and_lengths():
    responses = [[5, 2], [7, 8, 9], []]
    assert gather_responses(World(0, 1, torch.device("cpu")), responses, 4) == responses
    assert gather_responses(TwoRanks(0, 2, torch.device("cpu")), responses, 4) == responses * 2
