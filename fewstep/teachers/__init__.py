"""Frozen velocity fields: analytic, trained here, guided. Imports nothing by itself."""
