"""From a dataset's images to shuffled uint8 batches."""
