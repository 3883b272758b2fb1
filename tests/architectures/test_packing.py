"""Packed rows are refused before training where the architecture does not keep their examples apart."""

from __future__ import annotations

import pytest
from transformers import AutoConfig

from align.cli import architectures  # noqa: F401  the package of the matrix, which shares its models
from align.cli.architectures.cases import ARCHITECTURES
from align.errors import UserError
from align.models.packing import check_packing


def config_of(name: str):
    return AutoConfig.for_model(name, **ARCHITECTURES[name])


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_an_architecture_that_keeps_examples_apart_packs(name):
    check_packing(config_of(name), "packing", trust_remote_code=False)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("opt", "does not keep them apart"),  # its mask knows nothing of packed rows
        ("gpt_oss", "does not keep them apart"),  # positions are not handed to its masks
        ("falcon", "does not keep them apart"),  # ALiBi rounds the positions behind the first 256
        ("mamba", "does not keep them apart"),  # its state goes on
        ("qwen3_next", "cannot be computed"),
    ],
)
def test_an_architecture_that_does_not_is_refused_with_the_key(name, why):
    with pytest.raises(UserError, match=f"^padding_free: packed examples .* {name} .*{why}.*; set padding_free: false"):
        check_packing(config_of(name), "padding_free", trust_remote_code=False)
