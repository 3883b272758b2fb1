"""`align verify --architectures` and `--model`: whether every stage is exact on an architecture, or on a model folder.

`command` runs the cases in processes of their own and prints the table, `cases` has the architectures and makes small
models of them, `examine` does one case: `exactness` measures log-probabilities, scores and values, and `sft_loss`
the loss of SFT's trainer, against plain transformers, `stages` runs sft, reward and ppo.
"""
