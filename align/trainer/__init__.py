"""Shared code of the stages that train with a Hugging Face Trainer: SFT, the reward model and the encoders.

Imported by `align.sft`, `align.reward` and `align.encoders`. Public: `hf_trainer` (arguments, exact evaluation, training and
saving), `row_trainer.RowTrainer` (a Trainer for weighted rows), `checkpoint.SafeCheckpoints` (state in safetensors and JSON)
and `callback.StageCallback` (logs and complete checkpoints).
"""
