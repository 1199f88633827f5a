"""A run's record, its page with figures, its card."""
