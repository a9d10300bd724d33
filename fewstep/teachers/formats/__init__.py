"""Checkpoints of other projects: one file per project, which says how to know, read and take apart its weights."""
