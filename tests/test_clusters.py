"""Cluster recipes: the Slurm script with substitutes for Slurm's commands, torchrun as two nodes, SkyPilot."""

import importlib
import io
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import zipfile

import click
import numpy as np
import pytest
import torch.distributed.run as torch_launcher
import yaml
from PIL import Image

from training import checkpoint

# Runs the command on every node, as processes of this machine, and hands signals on to them.
SRUN = """#!/bin/bash
printf '%s\\n' "$1" "$2" "$3" >> "$RECORD/srun"
shift
tasks=()
for ((node = 0; node < SLURM_JOB_NUM_NODES; node++)); do
    SLURM_PROCID=$node "$@" &
    tasks+=($!)
done
trap 'signalled=1; kill -USR1 "${tasks[@]}"' USR1
worst=0
for task in "${tasks[@]}"; do
    while signalled=; wait "$task"; status=$?; [ -n "$signalled" ]; do :; done
    [ "$status" -gt "$worst" ] && worst=$status
done
exit "$worst"
"""

SCONTROL = """#!/bin/bash
if [ "$1 $2" = "show hostnames" ]; then
    printf '127.0.0.1\\nnode2\\n'
else
    echo "$@" >> "$RECORD/scontrol"
fi
"""

# Starts one rank as a child, as the real one does. The rank saves and ends well at USR1.
TORCHRUN = """#!/bin/bash
printf '%s\\n' "$@" > "$RECORD/torchrun-$SLURM_PROCID"
"$PYTHON" -c '
import os, signal, sys, time
name = os.environ["RECORD"] + "/rank-" + os.environ["SLURM_PROCID"]
def stop(number, frame):
    open(name + "-saved", "w").close()
    sys.exit(0)
signal.signal(signal.SIGUSR1, stop)
open(name + "-runs", "w").close()
time.sleep(float(os.environ["SECONDS_TO_TRAIN"]))
sys.exit(int(os.environ.get("RANK_STATUS", "0")))
' &
wait $!
"""


class Slurm:
    """A machine where `sbatch` has just started a job."""

    def __init__(self, folder, repo, stand_ins, **environment):
        self.record, self.repo, self.folder = folder / "record", repo, folder
        bin_dir = folder / "bin"
        for path in (self.record, bin_dir):
            path.mkdir()
        for name, text in stand_ins.items():
            (bin_dir / name).write_text(text)
            (bin_dir / name).chmod(0o755)
        path = f"{bin_dir}:{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
        job = {"SLURM_JOB_ID": "12345", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "node[1-2]"}
        ours = {"PATH": path, "PYTHON": sys.executable, "RECORD": str(self.record)}
        self.environment = {**os.environ, **job, **ours, **environment}

    def start(self, *arguments):
        return subprocess.Popen(
            ["bash", str(self.repo / "runs/slurm.sbatch"), *arguments],
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def wait_for(self, *names):
        deadline = time.monotonic() + 60
        while not all((self.record / name).exists() for name in names):
            assert time.monotonic() < deadline, f"{names} never came"
            time.sleep(0.02)

    def read(self, name):
        path = self.record / name
        return path.read_text().splitlines() if path.exists() else None


@pytest.fixture
def slurm(tmp_path, repo):
    stand_ins = {"srun": SRUN, "scontrol": SCONTROL, "torchrun": TORCHRUN}
    return lambda **environment: Slurm(tmp_path, repo, stand_ins, **environment)


def test_the_slurm_script_parses_and_asks_for_a_signal_and_a_requeue(repo):
    subprocess.run(["bash", "-n", str(repo / "runs/slurm.sbatch")], check=True)
    options = re.findall(r"^#SBATCH (\S+)$", (repo / "runs/slurm.sbatch").read_text(), re.MULTILINE)
    assert {"--requeue", "--signal=B:USR1@120", "--ntasks-per-node=1", "--open-mode=append"} <= set(options)


def test_each_node_runs_one_torchrun_that_meets_on_the_first(slurm):
    job = slurm(SECONDS_TO_TRAIN="0")
    process = job.start("train_lres.py", "--dataset=my data", "--batch=8")
    assert process.wait(60) == 0, process.stdout.read()
    assert job.read("srun")[:2] == ["--kill-on-bad-exit=1", "bash"]
    for node in range(2):
        assert job.read(f"torchrun-{node}") == [
            *("--nnodes=2", f"--node-rank={node}", "--master-addr=127.0.0.1", "--master-port=22345"),
            *("--nproc-per-node=gpu", "--signals-to-handle=SIGINT"),
            *("train_lres.py", "--dataset=my data", "--batch=8"),
        ]
    assert job.read("scontrol") is None


def test_time_that_is_up_lets_the_ranks_save_and_requeues_the_job(slurm):
    job = slurm(SECONDS_TO_TRAIN="60")
    process = job.start("train_lres.py")
    job.wait_for("rank-0-runs", "rank-1-runs")
    os.kill(process.pid, signal.SIGUSR1)  # what --signal=B:USR1@120 sends, to this shell alone
    assert process.wait(30) == 0
    assert job.read("rank-0-saved") is not None and job.read("rank-1-saved") is not None
    assert job.read("scontrol") == ["requeue 12345"]
    assert "goes back into the queue" in process.stdout.read()
    assert not list(job.folder.glob(".slurm-*"))


def test_a_job_that_slurm_ends_saves_and_leaves_the_queue_to_slurm(slurm):
    job = slurm(SECONDS_TO_TRAIN="60")
    process = job.start("train_lres.py")
    job.wait_for("rank-0-runs", "rank-1-runs")
    os.kill(process.pid, signal.SIGTERM)
    assert "Stopped after a checkpoint; job 12345 waits" in process.stdout.readline()
    assert job.read("rank-0-saved") is not None and process.poll() is None
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(10)
    assert job.read("scontrol") is None


def test_a_rank_that_fails_fails_the_job(slurm):
    job = slurm(SECONDS_TO_TRAIN="0", RANK_STATUS="3")
    assert job.start("train_lres.py").wait(60) == 3
    assert job.read("scontrol") is None


def test_without_a_command_the_job_says_what_to_give(slurm):
    process = slurm(SECONDS_TO_TRAIN="0").start()
    assert process.wait(10) == 2 and "sbatch runs/slurm.sbatch train_lres.py" in process.stdout.read()


# ----------------------------------------------------------------------------
# The launcher.


def commands_of_scripts():
    """Return each command of the scripts that run on several ranks, as words and its options."""
    for name in ("train", "train_lres", "train_sres", "calc_metrics"):
        command = importlib.import_module(name).main
        if not isinstance(command, click.Group):
            yield [f"{name}.py"], command.params
            continue
        context = click.Context(command)
        for entry in command.list_commands(context):
            found = command.get_command(context, entry)
            assert found is not None
            yield [f"{name}.py", entry], found.params


@pytest.mark.parametrize(("script", "params"), list(commands_of_scripts()))
def test_torchrun_takes_no_option_of_a_script_for_its_own(script, params):
    names = [name for param in params if isinstance(param, click.Option) and not param.hidden for name in param.opts]
    assert len(names) > 10
    for name in names:
        for words in ([f"{name}=1"], [name, "1"]):
            parsed = torch_launcher.parse_args(["--standalone", "--nproc_per_node=1", *script, *words])
            assert [parsed.training_script, *parsed.training_script_args] == [*script, *words]


# ----------------------------------------------------------------------------
# Real training on two nodes, which are two groups of processes here.


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Four clips of 40 frames of noise at 18x32."""
    root = tmp_path_factory.mktemp("data") / "noise"
    (root / "0018x0032").mkdir(parents=True)
    rng = np.random.RandomState(0)
    names = {f"clip{clip}": [f"{t:04d}.png" for t in range(40)] for clip in range(4)}
    with zipfile.ZipFile(root / "0018x0032" / "part-0.zip", "w") as archive:
        for clip, frames in names.items():
            for frame in frames:
                data = io.BytesIO()
                Image.fromarray(rng.randint(0, 256, (18, 32, 3)).astype(np.uint8)).save(data, "PNG")
                archive.writestr(f"{clip}/{frame}", data.getvalue())
        archive.writestr("frame_paths.json", json.dumps(names))
    return root


def toy(dataset, outdir, steps):
    options = ["--preset=toy", "--batch=2", "--num-frames=16", "--device=cpu", "--workers=0", "--sample-steps=0"]
    return ["train_lres.py", f"--dataset={dataset}", f"--outdir={outdir}", f"--steps={steps}", *options]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.slow
def test_the_two_commands_of_the_page_train_on_two_nodes(repo, dataset, tmp_path):
    text = (repo / "docs/clusters.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith("torchrun") and "--nnodes=2" in line]
    assert len(lines) == 2
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    port, agents = free_port(), []
    for line in lines:
        words = [re.sub("^(--master-addr=).*", r"\g<1>127.0.0.1", word) for word in shlex.split(line)]
        words = [re.sub("^(--master-port=).*", rf"\g<1>{port}", word) for word in words]
        words = [re.sub("^(--nproc-per-node=).*", r"\g<1>1", word) for word in words]
        words = words[: next(i for i, word in enumerate(words) if word.endswith(".py"))]
        command = [sys.executable, "-m", "torch.distributed.run", *words[1:], *toy(dataset, tmp_path / "runs", 2)]
        agents.append(subprocess.Popen(command, cwd=repo, env=environment, stdout=subprocess.PIPE, text=True))
    said = [agent.communicate(timeout=250)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0]
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert "2 ranks" in said[0] and "Finished 2 steps" in said[0]
    assert "Finished" not in said[1]  # only the first rank of all speaks
    assert checkpoint.load_train_state(checkpoint.train_state_path(run_dir, 2))["loop"]["step"] == 2
    assert "--nnodes=2" in (run_dir / "environment.txt").read_text()


@pytest.mark.slow
def test_a_slurm_job_of_two_nodes_stops_and_goes_on(repo, dataset, tmp_path):
    job = Slurm(tmp_path, repo, {"srun": SRUN, "scontrol": SCONTROL}, NPROC_PER_NODE="1", OMP_NUM_THREADS="1")
    job.environment |= {"MASTER_PORT": str(free_port()), "PYTHONPATH": str(repo), "PYTHONUNBUFFERED": "1"}
    job.folder = repo
    outdir = tmp_path / "runs"
    process = job.start(*toy(dataset, outdir, 1000), "--tick-steps=1")
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 1 "):
            os.kill(process.pid, signal.SIGUSR1)
    assert process.wait(100) == 0 and job.read("scontrol") == ["requeue 12345"]
    (run_dir,) = outdir.iterdir()
    ((step, _),) = checkpoint.list_checkpoints(run_dir)[-1:]
    assert 1 <= step < 1000

    process = job.start(*toy(dataset, outdir, step + 1), "--tick-steps=1")
    said = process.communicate(timeout=250)[0]
    assert process.returncode == 0 and f"Finished {step + 1} steps in {run_dir}" in said, said
    assert job.read("scontrol") == ["requeue 12345"] and not list(repo.glob(".slurm-*"))


def test_the_sky_task_is_whole(repo):
    task = yaml.safe_load((repo / "runs/sky.yaml").read_text())
    assert task["resources"]["use_spot"] is True and task["num_nodes"] >= 1
    subprocess.run(["bash", "-n", "-c", task["setup"]], check=True)
    subprocess.run(["bash", "-n", "-c", task["run"]], check=True)


def test_the_sky_task_runs_its_command_on_all_nodes(repo, tmp_path):
    task = yaml.safe_load((repo / "runs/sky.yaml").read_text())
    (tmp_path / "longtake/bin").mkdir(parents=True)
    (tmp_path / "longtake/bin/activate").write_text('torchrun() { printf "%s\\n" "$@"; }\n')
    sky = {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1", "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2"}
    environment = {**os.environ, **sky, **task["envs"], "HOME": str(tmp_path), "SKYPILOT_NUM_GPUS_PER_NODE": "8"}
    done = subprocess.run(["bash", "-c", task["run"]], env=environment, check=True, capture_output=True, text=True)
    assert done.stdout.splitlines() == [
        *("--nnodes=2", "--node-rank=1", "--master-addr=10.0.0.1", "--master-port=29500", "--nproc-per-node=8"),
        *(*task["envs"]["TRAIN"].split(), "--outdir=/runs/train_lres"),
    ]
    for folder in ("/data", "/runs"):
        assert folder in task["file_mounts"] and (folder == "/runs" or f"={folder}/" in task["envs"]["TRAIN"])
