"""fewstep: few-step students of flow-matching teachers, and what they cost in quality.

Importing this package imports neither torch nor any other heavy library.
"""

__version__ = "0.1.0"
