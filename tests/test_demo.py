"""The demo with minimal training: it runs every step, and reports that nothing was learned."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_demo_runs_every_step_and_checks_its_result(repo, tmp_path):
    outdir = tmp_path / "demo"
    command = [sys.executable, "-m", "runs.demo", f"--outdir={outdir}"]
    result = subprocess.run(
        [*command, "--lres-steps=4", "--sres-steps=4", "--clips=3"], cwd=repo, capture_output=True, text=True
    )
    assert result.returncode == 1 and "hardly changed" in result.stderr, result.stdout + result.stderr
    assert "goes on at step 2 of 4" in result.stdout
    page = (outdir / "index.html").read_text()
    for name in ("dataset.png", "seed=0_len=300_sres.mp4", "labdoom-tiny/seed=0_len=300_sres.mp4", "fvd32_16f: noise"):
        assert name in page
    for name in ("seed=0_len=300_sheet.png", "fvd32_16f: labdoom-tiny", "fvd32_16f: the toy pair"):
        assert name in page
    assert np.asarray(Image.open(outdir / "overview.png")).shape == (3 * 3 * 72 + 2 * 8, 8 * 128, 3)
