"""Networks of one and of two times. Imports nothing by itself: ``build`` needs torch, ``config`` does not."""
