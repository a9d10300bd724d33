"""Comparisons: a teacher and several students at equal budget, over several training seeds."""
