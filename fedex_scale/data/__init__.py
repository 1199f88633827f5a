"""From rows on the hub or on disk to the micro-batches that a client trains on."""
