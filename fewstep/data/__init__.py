"""Data sets, and the one seeded source of batches. Imports nothing by itself."""
