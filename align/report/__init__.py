"""`align report` and `align diagnose`: what runs have left behind, as one page for people, and what is wrong by their metrics."""
