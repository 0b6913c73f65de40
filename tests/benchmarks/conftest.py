"""Benchmarks of the networks at tiny sizes."""

import pytest

from benchmarks import subjects
from tests.training.longvideogan.tiny import TINY


@pytest.fixture
def tiny_stages(monkeypatch):
    """Presets of both stages of which each is tiny."""
    model = {stage: {**options, "batch": 2} for stage, options in TINY.items()}
    stages = {stage: {size: {"model": model[stage]} for size in subjects.SIZES} for stage in TINY}
    monkeypatch.setattr(subjects, "STAGES", stages)
