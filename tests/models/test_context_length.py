"""Responses that do not fit into a model's positions."""

from __future__ import annotations

import pytest

from align.errors import UserError
from align.models.context_length import check_responses_fit
from tests.worlds import tiny_llama


def test_shorter_prompts_are_advised_only_where_one_would_fit():
    config = tiny_llama().config  # of 256 positions
    with pytest.raises(UserError, match="set max_prompt_length: 6 with"):
        check_responses_fit([[3] * 10], 250, config)
    with pytest.raises(UserError) as error:
        check_responses_fit([[3] * 10], 600, config)
    assert "max_prompt_length" not in str(error.value)
