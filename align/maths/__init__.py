"""Everything with a right answer, as pure functions of tensors: advantages, losses, KL, masked statistics, perplexity.

Anything may import it; it imports torch only. Public: `gae` and the other estimators in `advantages`, `policy_loss` and
`value_loss` in `losses`, `k1` to `k3` in `kl`, the table in `estimators`.
"""
