"""Many trainings: a grid of settings, its runs and what they come to."""
