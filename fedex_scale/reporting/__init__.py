"""A run's record as one page with figures."""
