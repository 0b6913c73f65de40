"""The tasks of a Slurm job array together make the dataset of a single run."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from dnnlib import video


def task(repo, folder, *arguments, **variables):
    """Run the script as Slurm does: a copy of it, under the variables of one task."""
    script = shutil.copy(repo / "dataset_tools" / "make_dataset_sbatch.sh", folder / "slurm_script")
    environment = {
        **os.environ,
        "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}",
        "SLURM_SUBMIT_DIR": str(repo),
        **{name: str(value) for name, value in variables.items()},
    }
    command = ["bash", script, *map(str, arguments)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def array(index, count, highest=None):
    highest = count - 1 if highest is None else highest
    return {"SLURM_ARRAY_TASK_ID": index, "SLURM_ARRAY_TASK_COUNT": count, "SLURM_ARRAY_TASK_MAX": highest}


def content(root):
    return {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_all_tasks_make_what_one_run_makes(tmp_path, repo):
    (tmp_path / "my videos").mkdir()
    for index in range(4):
        with video.VideoWriter(tmp_path / "my videos" / f"{index}.mp4", 16, 16, fps=20) as writer:
            writer.write(np.full((3, 16, 16, 3), 50 * index, np.uint8))
    arguments = ("make_dataset_from_videos", tmp_path / "my videos")
    for index in (1, 0, 2):
        result = task(repo, tmp_path, *arguments, tmp_path / "array", "--sizes", "8x8", **array(index, 3))
        assert result.returncode == 0, result.stderr
        assert f"partition {index} of" in result.stdout
    command = [sys.executable, "-m", f"dataset_tools.{arguments[0]}", arguments[1], tmp_path / "one"]
    subprocess.run([*command, "--sizes", "8x8", "--num-partitions", "3"], cwd=repo, check=True)
    assert content(tmp_path / "array") == content(tmp_path / "one") and len(content(tmp_path / "one")) == 5
    again = {**array(2, 1, 2), "NUM_PARTITIONS": 3}
    assert task(repo, tmp_path, *arguments, tmp_path / "array", "--sizes", "8x8", **again).returncode == 0
    assert content(tmp_path / "array") == content(tmp_path / "one")


@pytest.mark.parametrize(
    ("arguments", "variables", "message"),
    [
        ((), array(0, 2), "say which maker to run"),
        (("make_dataset_from_dreams",), array(0, 2), "there is no dataset_tools/make_dataset_from_dreams.py in"),
        (("make_dataset_from_videos",), {}, "start it by sbatch"),
        (("make_dataset_from_videos",), array(5, 2, 17), "say how many partitions there are by NUM_PARTITIONS"),
    ],
)
def test_wrong_uses_are_explained(tmp_path, repo, arguments, variables, message):
    result = task(repo, tmp_path, *arguments, **variables)
    assert result.returncode == 2 and message in result.stderr
