"""PPO-ptx (arXiv 2203.02155 eq. 2): the likelihood of other text, trained in the same optimizer steps."""

from __future__ import annotations

from datasets import Dataset

from align.data.batches import PromptLoader
from align.data.collate import chunks, pad_right
from align.data.tokenize import IGNORE_INDEX
from align.models.forward import label_loss
from align.ppo.ppo_run import PPORun, Sums


def ptx_gradient(run: PPORun, rows: Dataset, step: int) -> list[Sums]:
    """Add the gradient of `ptx_coef` times the mean negative log-likelihood over the rows of a step, on all ranks.

    Returns:
        sums over this rank's microbatches: negative log-likelihood (nats) and tokens.
    """
    recipe, world = run.recipe, run.world
    chosen = rows[PromptLoader(len(rows), recipe.seed).batch(step, recipe.ptx_batch_size)]
    labels = chosen["labels"]
    trained = sum(label != IGNORE_INDEX for row in labels for label in row[1:])  # nothing predicts the first token
    sums = []
    mine = range(world.rank, len(labels), world.size)
    for part in chunks(len(mine), run.plan.micro_batch_size):
        ids, _ = pad_right([chosen["input_ids"][i] for i in mine[part]], 0)
        targets, _ = pad_right([labels[i] for i in mine[part]], IGNORE_INDEX)
        ids, targets = ids.to(world.device), targets.to(world.device)
        loss, logprobs = label_loss(run.models.policy, ids, targets, recipe.ptx_coef / trained)
        run.models.policy.backward(loss)
        sums.append({"ptx/loss": -logprobs.sum(), "ptx/tokens": (targets[:, 1:] != IGNORE_INDEX).sum()})
    return sums
