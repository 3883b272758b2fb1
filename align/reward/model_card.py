"""The model card of a reward model: how to load it, and code that gives a row the score that this package gives it."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from align.config.reward import RewardRecipe
from align.data.chat_template import render_chat, template_kwargs, writes_date
from align.data.encode import encode_pair
from align.data.end_tokens import end_ids
from align.data.reasoning import scores_reasoning
from align.data.turn_end import after_turn_end
from align.errors import BadRow, TemplateFailure
from align.reward.inputs import RewardInputs
from align.runs.markdown import code_span, markdown_text, python_text
from reward_models.linear_head import SequenceClassifier

# Dialogues on which the card's plain code is compared with the ids of this package.
PROBES = (
    [{"role": "user", "content": "a"}],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}],
)
ANSWER = "d"


def reward_card(recipe: RewardRecipe, inputs: RewardInputs) -> str:
    """Markdown without the results, which every stage adds."""
    card = CARD if type(inputs.config) in SequenceClassifier.mapping else CARD_OF_LINEAR_HEAD
    return (
        card.format(
            folder=python_text(recipe.output_dir),
            base=markdown_text(recipe.model_name_or_path),
            ids=ENCODER_IDS if inputs.is_encoder else decoder_ids(recipe.output_dir, inputs.tokenizer),
            pad=code_span(str(inputs.tokenizer.pad_token)),
            centred_on=f"responses of {markdown_text(inputs.sft.path)}"
            if inputs.sft
            else "chosen responses of the training rows",
        )
        + ("" if scores_reasoning(inputs.tokenizer) else ANSWER_ALONE)
        + (OF_HALVES if recipe.train_judge else "")
    )


def decoder_ids(folder: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Code from `prompt` and `response` to `ids`, for a decoder."""
    if not tokenizer.chat_template:
        return TEXT_IDS.format(ends=list(end_ids(tokenizer)))
    kwargs, after = template_kwargs(tokenizer), after_turn_end(tokenizer)
    if not _plain_code_is_exact(tokenizer, after):
        return OWN_IDS.format(folder=python_text(folder), kwargs=f", chat_template_kwargs={kwargs!r}" if kwargs else "")
    return CHAT_IDS.format(
        ends=list(end_ids(tokenizer)),
        kwargs=f", **{kwargs!r}" if kwargs else "",
        after=f".removesuffix({after!r})" if after else "",
    )


def _plain_code_is_exact(tokenizer: PreTrainedTokenizerBase, after: str) -> bool:
    """Whether `CHAT_IDS` gives the ids of this package; not where a template opens thoughts, writes the date, or the like."""
    if writes_date(tokenizer):
        return False
    try:
        for prompt in PROBES:
            messages = [*prompt, {"role": "assistant", "content": ANSWER}]
            text = render_chat(tokenizer, messages, add_generation_prompt=False).removesuffix(after)
            ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            ids += [tokenizer.eos_token_id] * (ids[-1] not in end_ids(tokenizer))
            if ids != encode_pair(tokenizer, prompt, ANSWER):
                return False
    except (BadRow, TemplateFailure):  # as of a template that has no second turn
        return False
    return True


TITLE = """# A reward model

Trained from {base} by the `reward` stage of align: it scores a response to a prompt, higher is better.
"""
CARD = (
    TITLE
    + """
```python
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

model = AutoModelForSequenceClassification.from_pretrained({folder})
tokenizer = AutoTokenizer.from_pretrained({folder})
{ids}
score = model(torch.tensor([ids])).logits[0, 0] - model.config.score_mean
```

`config.score_mean` is the mean logit of {centred_on}: with it subtracted, their mean score is 0. Pad batches on the right, with an
attention mask and the tokenizer's own padding token, {pad}: not end-of-text, the position at which the score is read.
"""
)
# transformers has no sequence classifier of this architecture.
CARD_OF_LINEAR_HEAD = (
    TITLE
    + """
It is a linear layer, `score`, on the last hidden state of the base model at the last token. transformers has no sequence
classifier of this architecture, so align's package `reward_models` loads it:

```python
import torch
from reward_models import load_reward_model
from transformers import AutoTokenizer

model = load_reward_model({folder})
tokenizer = AutoTokenizer.from_pretrained({folder})
{ids}
score = model(torch.tensor([ids])).logits[0, 0] - model.config.score_mean
```

`config.score_mean` is the mean logit of {centred_on}: with it subtracted, their mean score is 0. Batches need an attention mask.
"""
)
OF_HALVES = (
    "It was trained on one of two halves of the pairs, split by prompt: one for the reward model, the other for its judge, which is in the "
    "folder `judge` of the reward model's.\n"
)
ANSWER_ALONE = "Of a response with reasoning, only the answer behind it is scored.\n"
ENCODER_IDS = 'ids = tokenizer(prompt, response)["input_ids"]  # texts'
TEXT_IDS = """ids = tokenizer(prompt + response)["input_ids"]  # texts
if ids[-1] not in {ends}:  # some tokenizers add EOS
    ids.append(tokenizer.eos_token_id)"""
CHAT_IDS = """if isinstance(prompt, str):
    ids = tokenizer(prompt + response)["input_ids"]
else:  # messages: the chat template writes all special tokens
    messages = [*prompt, {{"role": "assistant", "content": response}}]
    text = tokenizer.apply_chat_template(messages, tokenize=False{kwargs}){after}
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
if ids[-1] not in {ends}:
    ids.append(tokenizer.eos_token_id)"""
# The template renders a turn otherwise than generation would write it, or writes the date.
OWN_IDS = """# align's own ids: the chat template alone writes a response otherwise than it is scored
from align.data.encode import encode_pair
from align.models.tokenizer import load_tokenizer

ids = encode_pair(load_tokenizer({folder}{kwargs}), prompt, response)  # texts, or messages and a text"""
