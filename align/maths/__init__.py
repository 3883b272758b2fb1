"""Everything with a right answer, as pure functions of tensors. Imports torch only."""
