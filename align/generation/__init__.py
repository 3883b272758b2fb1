"""Responses of a language model to prompts, and reward-model scores of token ids, over all ranks.

Stages, `align.evaluate` and `align.trainer` import from here. Public: `generate.generate` (the decoding loop),
`responses.respond_to_batch` (prompts to lists of ids), `sampler.Sampler` (the settings of a run), `scoring.score_ids`.
"""
