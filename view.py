"""Explore the videos of trained models in a browser: play, jump to any frame, compare seeds, save clips, and steer.

# The included models, or your own; repeat --model where a model is several files
python view.py
python view.py --model=MODEL.pkl

# Walk with the arrow keys through the world of a model with actions; the page is at http://localhost:8008/play
python view.py --model=PREDICTOR.pkl --context=data/labdoom-val

# On a machine without a screen: start it there, make a tunnel here, and open http://localhost:8008
ssh -N -L 8008:127.0.0.1:8008 USER@MACHINE

Models are paths, URLs or names, as for generate.py; the browser chooses among them, and reaches no other file. The
page needs nothing but this server. docs/explorer.md has the details.
"""

from __future__ import annotations

from torch_utils import thread_cache

if __name__ == "__main__":
    thread_cache.restart_without()

import contextlib
import ipaddress
import os
import shlex
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from dnnlib import threads
from training.command_line import AUTO, DEVICES, PRECISIONS, Given, as_help, check_device, model_options, take_model

if TYPE_CHECKING:
    from explorer.server import Server
    from explorer.session import Session

POLL_SEC = 0.1  # how often the main thread, and that of the server, look whether they should end


@click.command(help=as_help(__doc__))
@model_options("model", default="the included ones")
@click.option("--context", help="Video that the model continues or transforms, as for generate.py", metavar="PATH")
@click.option("--actions", help="Actions of the frames, as for generate.py", metavar="FILE")
@click.option("--port", help="Where the page is; 0: any that is free", default=8008, show_default=True, type=int)
@click.option(
    "--host", help="The address to listen at; 0.0.0.0 lets the whole network in", default="127.0.0.1", show_default=True
)
@click.option(
    "--cache",
    "cache_mib",
    help="Memory for frames that have been made, in MiB",
    default=512,
    show_default=True,
    type=click.IntRange(min=16),
)
@click.option("--device", help="[default: cuda if there is a GPU]", type=click.Choice(DEVICES))
@click.option(
    "--precision", help="As for generate.py", default=AUTO, show_default=True, type=click.Choice([AUTO, *PRECISIONS])
)
@click.option("--trust", help="Run the code that came with the models: only for files of your own", is_flag=True)
def main(port: int, host: str, **arguments: Any) -> None:
    """See the module's docstring."""
    given = take_model(arguments)
    try:
        session = _run(given, host, port, **arguments)
    except (ValueError, OSError, OverflowError) as error:
        raise click.ClickException(_explain(error, host, port)) from error
    click.echo("\nStopped.")
    flags = [*([] if given.models else [f"--model={next(iter(session.models))}"]), *given.flags]
    flags += [f"--{name}={arguments[name]}" for name in ("context", "actions") if arguments[name]]
    click.echo(f"Next: python generate.py --outdir=outputs --seed=0 {shlex.join(flags)}")
    if not session.has_stopped:  # a network is still at work, in a thread that cannot be interrupted
        sys.stdout.flush()
        os._exit(0)


def _run(given: Given, host: str, port: int, **arguments: Any) -> Session:
    """Open what was given and serve the page until told to stop; return the session, which is over."""
    threads.share_cores()
    import torch

    from explorer.server import Handler, Server
    from explorer.session import PromptFiles, Session, list_entries
    from torch_utils import host_memory

    precision = arguments["precision"]
    device = check_device(arguments["device"], precision)
    host_memory.keep_freed(device)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    session = Session(
        list_entries(given.models), device, precision, arguments["trust"], arguments["cache_mib"] << 20,
        given.options, prompt_files=PromptFiles(arguments["context"], arguments["actions"]),
    )  # fmt: skip
    with stopping() as stop, session:
        if given.models:  # say at once what is wrong with what was given
            opening = session.worker.submit(session.open_any(next(iter(session.models))))
            while not opening.wait(POLL_SEC) and not stop.is_set():
                pass
            if opening.has_ended and (reason := opening.result()):
                click.echo(reason)
        with Server(host, port, partial(Handler, session)) as server:
            _serve(server, session, stop)
    return session


@contextlib.contextmanager
def stopping() -> Iterator[threading.Event]:
    """Give an event that Ctrl-C and SIGTERM set, in the main thread; the second one is a KeyboardInterrupt."""
    stop = threading.Event()

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _serve(server: Server, session: Session, stop: threading.Event) -> None:
    """Answer until told to stop."""
    host, port = server.server_address[:2]
    click.echo(f"Explorer of {', '.join(session.models)} ({session.device}, {session.precision}): {server.url}")
    if is_loopback(str(host)):
        click.echo(
            f"From another machine: ssh -N -L {port}:{host}:{port} {socket.gethostname()}, then the same address"
        )
    else:
        click.echo("All who reach this port may use it: the server knows no passwords.")
    if session.play.known:
        click.echo(f"To steer it with the arrow keys: {server.url}/play")
    click.echo("Ctrl-C ends it.")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": POLL_SEC}, daemon=True)
    thread.start()
    stop.wait()
    server.shutdown()


def is_loopback(host: str) -> bool:
    """Return whether an address can be reached from this machine alone."""
    return host == "localhost" or ipaddress.ip_address(host).is_loopback


def _explain(error: Exception, host: str, port: int) -> str:
    """Return one sentence about why it does not start."""
    if isinstance(error, OverflowError):
        return f"port {port} does not exist: use --port from 0 to 65535"
    if isinstance(error, OSError) and error.strerror:
        return f"cannot listen at {host}, port {port} ({error.strerror}): use another --port or --host"
    return str(error)


if __name__ == "__main__":
    main()
