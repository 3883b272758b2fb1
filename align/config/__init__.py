"""Recipes: their keys and rules, the table of stages, and reading them strictly from YAML, overrides or Python.

Imported by everything but `align.maths`, `align.errors` and `reward_models`; imports neither torch nor another folder.
Public: `load.load_recipe` and `load.as_recipe`, `stages.STAGES`, and the recipe classes in a file per stage.
"""
