"""What `vitlit data ...` does to data before training."""
