"""What judges many runs, above train.py: nothing here is trained."""
