"""The same rounds between real sites: two commands over directories that any carrier can move."""
