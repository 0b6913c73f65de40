"""Published layouts of footage, read as they are: one class for each, found by what is at a path."""
