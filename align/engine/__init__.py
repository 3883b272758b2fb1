"""A model on one process or sharded over many: engines, processes and collectives, batch sizes, optimizer, precision.

May import `align.models` and below; stages, evaluation and generation import it. Start from `connect` and `World`
(distributed.py), `batch_plan` (batch_plan.py), the `Engine` and `TrainEngine` protocols (engine.py), and
`train_engine` and `frozen_engine` (build.py). Only this folder and `align.compat` import deepspeed.
"""
