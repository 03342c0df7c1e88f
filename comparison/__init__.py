"""What plans and judges many runs."""
