"""The loop in separate processes: signals, a full disk, several ranks."""

import contextlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO, cast

import pytest
import torch

from dnnlib.locks import open_locked
from tests.training import tiny_gan
from tests.training.tiny_gan import TinyGAN, assert_equal, final_state, stats_lines
from training import checkpoint
from training.loop import StopSignals, train

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return tiny_gan.write_dataset(tmp_path_factory.mktemp("data") / "stripes")


@pytest.fixture
def options(dataset, tmp_path):
    """Return a function that makes the options of a short run in a folder of the test's own."""
    return tiny_gan.option_maker(dataset, tmp_path / "runs")


@contextlib.contextmanager
def start(options, *launcher, limit_bytes=None):
    """Return a process that trains the tiny system with the options given, its output in one stream."""

    def limit():
        if limit_bytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))

    command = [sys.executable, *launcher, tiny_gan.__file__, json.dumps(vars(options))]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipes: dict = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(command, env=environment, text=True, preexec_fn=limit, **pipes) as process:
        try:
            yield process, cast(IO[str], process.stdout)
        finally:
            process.kill()


def read_until(stream, text):
    lines = []
    for line in stream:
        lines.append(line)
        if text in line:
            return
    raise AssertionError("".join(lines))


@pytest.mark.slow
def test_a_terminated_process_leaves_a_run_that_can_be_continued(options):
    asked = options(steps=10**6, tick_steps=50, checkpoint_steps=0)
    with start(asked) as (process, stream):
        read_until(stream, "step 50 ")
        process.send_signal(signal.SIGTERM)
        output = stream.read()
        assert process.wait(60) == 0
    assert f"to continue: python {tiny_gan.__file__} " in output
    (run_dir,) = Path(asked.outdir).iterdir()
    (step, _), *_ = checkpoint.list_checkpoints(run_dir)
    assert step > 50 and f"Stopped at step {step}" in output
    assert not list(run_dir.glob("checkpoints/.*")) and checkpoint.network_path(run_dir, step).is_file()
    result = train(TinyGAN, options(steps=step + 1, tick_steps=50, checkpoint_steps=0))
    assert result.run_dir == run_dir and result.finished


@pytest.mark.slow
def test_a_second_interrupt_stops_at_once(options):
    with start(options(steps=10**6, tick_steps=50, model={"sleep_sec": 60})) as (process, stream):
        read_until(stream, "sleeping")
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGINT)
        read_until(stream, "twice stops at once")
        time.sleep(1.5)  # two at once are one: torchrun passes on what the terminal has sent already
        process.send_signal(signal.SIGINT)
        assert "KeyboardInterrupt" in stream.read()
        assert process.wait(60) != 0


@pytest.mark.slow
def test_a_full_disk_costs_no_checkpoint_and_no_training(options, tmp_path):
    run_dir = train(TinyGAN, options(steps=2)).run_dir
    before = {path: path.read_bytes() for path in run_dir.glob("checkpoints/*")}
    with start(options(steps=6), limit_bytes=20_000) as (process, stream):
        output = stream.read()
        assert process.wait(60) == 1
    assert "Step 4 was not saved in" in output and "File too large" in output and "Training goes on" in output
    assert "Step 6 was not saved in" in output.splitlines()[-1] and "ckpt-00000002-train.pt. Free disk space" in output
    assert before == {path: path.read_bytes() for path in run_dir.glob("checkpoints/*")}
    assert not list(run_dir.glob("checkpoints/.*"))
    assert train(TinyGAN, options(steps=6)).run_dir == run_dir
    whole = train(TinyGAN, options(steps=6, outdir=str(tmp_path / "whole"))).run_dir
    assert_equal(final_state(run_dir, 6)["modules"], final_state(whole, 6)["modules"])


@pytest.mark.slow
def test_a_rank_that_cannot_begin_does_not_leave_the_others_waiting(options):
    asked = options(model={"fails_on_rank": 1})
    with start(asked, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2") as (ranks, stream):
        output = stream.read()
        assert ranks.wait(60) != 0
    assert "SharedError: this machine has no such file" in output
    assert "SharedError: rank 1: this machine has no such file" in output
    assert not Path(asked.outdir).exists()


def refused(asked):
    """Return what training says instead of beginning."""
    with pytest.raises(ValueError) as caught:
        train(TinyGAN, asked)
    return str(caught.value)


class Stopped(TinyGAN):
    """Gets a signal within its first step."""

    def step(self, batches, step):
        os.kill(os.getpid(), signal.SIGTERM)
        return super().step(batches, step)


@pytest.fixture
def hang_ups():
    """Let processes that start here be stopped by SIGHUP, also where the tests run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("hang_ups")
def test_one_process_at_a_time_trains_in_a_run_and_another_may_wait(options, capsys):
    with start(options(steps=10**6, tick_steps=50)) as (process, stream):
        read_until(stream, "step 50 ")
        rest: list[str] = []  # is read meanwhile, as a process whose pipe is full waits, and does not end
        reader = threading.Thread(target=rest.extend, args=(stream,))
        reader.start()
        (run_dir,) = Path(options().outdir).iterdir()
        who = f"process {process.pid} on {socket.gethostname()} since "
        for changes in ({}, {"resume": "latest"}, {"resume": str(run_dir)}, {"outdir": str(run_dir)}):
            message = refused(options(**changes))
            assert f"{run_dir} is in use by {who}" in message and "add --wait" in message
        assert train(TinyGAN, options(seed=1, steps=1)).run_dir != run_dir  # another run goes on
        timer = threading.Timer(2, process.send_signal, [signal.SIGHUP])
        timer.start()
        result = train(Stopped, options(steps=10**6, tick_steps=50, wait=True))
        timer.join()
        assert process.wait(60) == 0
        reader.join()
    assert "everything is saved" in "".join(rest)
    assert f"Waiting for {who}" in capsys.readouterr().out
    assert result.run_dir == run_dir and result.signal == signal.SIGTERM and not (run_dir / ".lock").exists()
    steps = [line["step"] for line in stats_lines(run_dir)]
    assert steps == sorted(set(steps))


def test_commands_that_begin_at_once_make_one_run_and_a_killed_one_frees_it(options):
    asked = options(steps=10**6, tick_steps=50, checkpoint_steps=0)
    with start(asked) as one, start(asked) as other:
        deadline = time.monotonic() + 60
        while one[0].poll() is None and other[0].poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        (process, stream), (late, late_stream) = (one, other) if one[0].poll() is None else (other, one)
        assert late.wait() == 1 and f"is in use by process {process.pid} on " in late_stream.read()
        read_until(stream, "step 50 ")
        process.kill()
        process.wait()
    (run_dir,) = Path(asked.outdir).iterdir()
    (run_dir / ".lock").write_bytes(b"\0" * 10)
    with open_locked(run_dir / ".lock"):
        assert "in use by another process" in refused(options())
    assert train(TinyGAN, options(steps=1)).run_dir == run_dir


def test_a_hang_up_that_nohup_ignores_stops_nothing(options, capsys):
    handler = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not signals.received
            os.kill(os.getpid(), signal.SIGTERM)
            assert signals.received == signal.SIGTERM
    finally:
        signal.signal(signal.SIGHUP, handler)


@pytest.mark.slow
def test_two_ranks_equal_one(options, tmp_path):
    one = train(TinyGAN, options(steps=5, outdir=str(tmp_path / "one"))).run_dir
    asked = options(steps=5, metrics=("fails", "fails-on-1"))
    with start(asked, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2") as (ranks, stream):
        output = stream.read()
        assert ranks.wait(60) == 0, output
    assert output.count("step 5  metric/fails failed (RuntimeError: on all); training goes on") == 1
    assert output.count("step 5  metric/fails-on-1 failed (RuntimeError: rank 1: on one); training goes on") == 1
    (two,) = Path(options().outdir).iterdir()
    assert "batch    4 clips: 2 ranks" in output and output.count("Finished 5 steps") == 1
    states = final_state(one, 5), final_state(two, 5)
    for name, module in states[0]["modules"].items():
        for key, tensor in module.items():
            assert torch.allclose(tensor, states[1]["modules"][name][key], rtol=0, atol=1e-5), (name, key)
    assert states[0]["system"]["strength"] == pytest.approx(states[1]["system"]["strength"], rel=1e-4) != 0
    assert stats_lines(one)[1]["loss/D_loss"] == pytest.approx(stats_lines(two)[1]["loss/D_loss"], rel=1e-5)

    # The run of two ranks goes on with one.
    assert train(TinyGAN, options(steps=6)).run_dir == two
