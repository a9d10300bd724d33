"""Rectified flow: pairs of a teacher, straightened flows and their distillation. Imports nothing by itself."""
