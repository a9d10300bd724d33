"""Objectives, one per file, and the trainer they share. Imports nothing by itself."""
