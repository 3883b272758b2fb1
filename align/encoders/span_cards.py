"""The model cards of token classifiers and of models that answer questions from a passage."""

from __future__ import annotations

from align.encoders.tags import WORDS, TagSet
from align.runs.markdown import code_span, markdown_text, python_text


def tagger_card(base: str, folder: str, tag_set: TagSet) -> str:
    """The card of a token classifier: its labels, and code that labels a text."""
    whole = tag_set.scheme == WORDS
    return TAGGER.format(
        base=markdown_text(base),
        what="a tag for each word" if whole else "entities",
        names=", ".join(map(code_span, tag_set.types)),
        rule=" A word has the label of its first token." if whole else "",
        folder=python_text(folder),
    )


TAGGER = """# A token classifier

Trained from {base} by the `token-classification` stage of align: {what} of {names}.{rule}
`align predict` writes the spans that it finds in a file's rows.

```python
import torch
from transformers import AutoModelForTokenClassification, AutoTokenizer

model = AutoModelForTokenClassification.from_pretrained({folder})
tokenizer = AutoTokenizer.from_pretrained({folder})
encoded = tokenizer(text, return_offsets_mapping=True, return_tensors="pt")
offsets = encoded.pop("offset_mapping")[0].tolist()
labels = [model.config.id2label[i] for i in model(**encoded).logits[0].argmax(dim=1).tolist()]
found = [(text[start:end], label) for (start, end), label in zip(offsets, labels) if label != "O" and text[start:end].strip()]
```
"""


def reader_card(base: str, folder: str, unanswerable: bool) -> str:
    """The card of a model that answers from a passage, with code that does so."""
    none = (
        " It may find that the passage has no answer: its first token then has the highest score."
        if unanswerable
        else ""
    )
    return READER.format(base=markdown_text(base), folder=python_text(folder), none=none)


READER = """# Answers from a passage

Trained from {base} by the `question-answering` stage of align: the answer to a question is a span of the passage.{none}
`align predict` answers the questions of a file's rows, with long passages in windows.

```python
import torch
from transformers import AutoModelForQuestionAnswering, AutoTokenizer

model = AutoModelForQuestionAnswering.from_pretrained({folder})
tokenizer = AutoTokenizer.from_pretrained({folder})
encoded = tokenizer(question, context, return_offsets_mapping=True, return_tensors="pt")
offsets = encoded.pop("offset_mapping")[0].tolist()
output = model(**encoded)
start, end = int(output.start_logits.argmax()), int(output.end_logits.argmax())
answer = context[offsets[start][0] : offsets[end][1]] if start else ""
```
"""
