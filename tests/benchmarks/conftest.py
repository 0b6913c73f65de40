"""Benchmarks of the networks at tiny sizes."""

import pytest

from benchmarks import subjects
from tests.training.longvideogan.tiny import TINY


@pytest.fixture
def tiny_stages(monkeypatch):
    """Return presets of both stages of which each is tiny."""
    model = {stage: dict(options) for stage, options in TINY.items()}
    stages = {stage: {size: {"batch": 2, "model": model[stage]} for size in subjects.SIZES} for stage in TINY}
    monkeypatch.setattr(subjects, "STAGES", stages)
