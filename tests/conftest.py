"""Settings for all tests and the processes they start: one thread each, no network."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run side by side, and these models gain nothing from threads
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
