"""TATS: a transformer of the codes of clips, and three ways to write long videos with it. See README.md."""
