"""Progressive distillation: halving the steps of a sampler, stage by stage. Imports nothing by itself."""
