"""Load, adapt, run and save transformers models and tokenizers, on one process.

May import `align.data` and below; engines and everything above import it. Start from `load_config`, `load_policy`
(load.py), `load_tokenizer` (tokenizer.py), `peft_config` and `freeze` (trainable.py), and `response_logprobs`,
`response_loss` and `response_values` (forward.py).
"""
