"""Samplers that systems share: of tokens one after another, and of long videos in pieces."""
