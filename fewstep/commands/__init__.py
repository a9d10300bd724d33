"""Groups of commands that `cli` assembles. Imports nothing by itself."""
