"""Every setting of a run as data: read, checked, described; no torch."""
