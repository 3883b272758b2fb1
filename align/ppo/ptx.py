"""PPO-ptx (arXiv 2203.02155 eq. 2): the likelihood of other text, trained in the same optimizer steps."""

from __future__ import annotations

from typing import NamedTuple

from datasets import Dataset
from torch import Tensor

from align.data.batches import PromptLoader
from align.data.collate import pad_right
from align.data.tokenize import IGNORE_INDEX
from align.models.forward import label_loss
from align.ppo.ppo_run import PPORun, Sums


class TextPass(NamedTuple):
    """Texts of one forward-backward pass on this rank."""

    ids: Tensor  # [m, S] int64
    labels: Tensor  # [m, S] int64
    scale: float  # weight of the negative log-likelihood of a label in the loss


def ptx_passes(run: PPORun, rows: Dataset, step: int) -> list[TextPass]:
    """This rank's passes over the rows of a step, of which all ranks have equally many."""
    recipe, world = run.recipe, run.world
    chosen = rows[PromptLoader(len(rows), recipe.seed).batch(step, recipe.ptx_batch_size)]
    ids, labels = chosen["input_ids"], chosen["labels"]
    trained = sum(label != IGNORE_INDEX for row in labels for label in row[1:])  # nothing predicts the first token
    passes = []
    for part in run.plan.passes([len(row) for row in ids])[world.rank]:
        padded, _ = pad_right([ids[row] for row in part], 0)
        targets, _ = pad_right([labels[row] for row in part], IGNORE_INDEX)
        passes.append(TextPass(padded.to(world.device), targets.to(world.device), recipe.ptx_coef / trained))
    return passes


def ptx_gradient(run: PPORun, passes: list[TextPass]) -> list[Sums]:
    """Add the gradient of `ptx_coef` times the mean negative log-likelihood over the rows of a step, on all ranks.

    Returns:
        sums over each pass: negative log-likelihood (nats) and tokens.
    """
    sums = []
    for ids, labels, scale in passes:
        loss, logprobs = label_loss(run.models.policy, ids, labels, scale)
        run.models.policy.backward(loss)
        sums.append({"ptx/loss": -logprobs.sum(), "ptx/tokens": (labels[:, 1:] != IGNORE_INDEX).sum()})
    return sums
