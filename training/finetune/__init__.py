"""Fine-tuning: methods, the table of their results, scores, plots."""
