"""What a few-step sampler costs: features, metrics, the step sweep and the report. Imports nothing by itself."""
