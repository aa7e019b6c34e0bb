"""A run's folder: its config and checkpoints, its lock, and how it is stopped and continued."""
