"""Sources of scores for prompts with responses: trained reward models, Python functions, and weighted sums of them.

Any folder of `align` may import it; it imports nothing of `align`. `rules.numeric_answer` is a reward function, and a
grader of `align evaluate`; everything else that is public is listed below.
"""

from reward_models.combine import RewardSum
from reward_models.ensemble import RewardEnsemble
from reward_models.functions import FunctionReward
from reward_models.heads import init_head, keep_head_float32, score_head, score_sequences
from reward_models.linear_head import SequenceClassifier, TokenClassifier
from reward_models.load import load_reward_model
from reward_models.responses import Responses, RewardSource, Turns, passes
from reward_models.trained import ModelReward

__all__ = [
    "FunctionReward",
    "ModelReward",
    "Responses",
    "RewardEnsemble",
    "RewardSource",
    "RewardSum",
    "SequenceClassifier",
    "TokenClassifier",
    "Turns",
    "init_head",
    "keep_head_float32",
    "load_reward_model",
    "passes",
    "score_head",
    "score_sequences",
]
