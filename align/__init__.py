"""RLHF in three stages: supervised fine-tuning, a reward model, PPO."""
