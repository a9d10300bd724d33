"""Trainable flow maps over a two-time network. Imports nothing by itself."""
