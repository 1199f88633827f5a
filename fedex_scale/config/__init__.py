"""Every setting of a run as data: read, checked, described; nothing else of the project."""
