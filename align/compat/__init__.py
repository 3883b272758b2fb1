"""Every private or undocumented name of other libraries that this package relies on, in a file for each library.

The rest of the package reaches them through these modules, which import the libraries only when asked; a name that has
to be spelt elsewhere, because a subclass overrides it, is listed in `OVERRIDDEN`. `tests/test_compat.py` checks each
of them, so that an upgrade which removes one fails there first.
"""

# Methods that subclasses in this package override or call: class -> method -> the parameters that they count on.
OVERRIDDEN: dict[str, dict[str, tuple[str, ...]]] = {
    "transformers.Trainer": {
        "_run_epoch": ("epoch",),
        "_get_train_sampler": ("train_dataset",),
        "_get_eval_sampler": ("eval_dataset",),
        "_determine_best_metric": ("metrics", "trial"),
        "_save_checkpoint": ("model", "trial"),
        "_get_num_items_in_batch": ("batch_samples", "device"),
        "get_batch_samples": ("epoch_iterator", "num_batches", "device"),
        "create_optimizer": (),
        # Everything that writes or reads a file of a checkpoint.
        "_save": ("output_dir", "state_dict"),
        "_save_optimizer_and_scheduler": ("output_dir",),
        "_save_rng_state": ("output_dir",),
        "_init_training_state": ("max_steps",),
        "_prepare_for_training": ("max_steps", "train_dataloader", "resume_from_checkpoint"),
        "_load_from_checkpoint": ("resume_from_checkpoint", "model"),
        "_load_rng_state": ("checkpoint",),
        "_load_best_model": (),
    },
    "trl.trainer.base_trainer._BaseTrainer": {"_send_telemetry": (), "create_model_card": ()},
    "peft.tuners.tuners_utils.BaseTuner": {
        "_check_target_module_exists": ("peft_config", "key"),
        "_create_and_replace": ("peft_config", "adapter_name", "target", "target_name", "parent", "current_key"),
    },
    "transformers.cache_utils.DynamicLayer": {
        "update": ("key_states", "value_states"),
        "lazy_initialization": ("key_states", "value_states"),
        "get_seq_length": (),
        "batch_select_indices": ("indices",),
    },
}
