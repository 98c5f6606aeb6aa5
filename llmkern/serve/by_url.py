"""One run against a server by URL: energy of the GPUs of this host, if the server has them."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from llmkern.errors import DeviceError, UsageError
from llmkern.progress import Stages
from llmkern.record import environment, signals
from llmkern.record.annotate import Annotator
from llmkern.record.clock import ClockWatch
from llmkern.record.device.interface import EnergyMeter
from llmkern.record.options import TraceOptions
from llmkern.record.rig import Rig
from llmkern.runfolder import RunWriter
from llmkern.runfolder.facts import DeviceFacts, RunFacts, without_home
from llmkern.runfolder.place import check_output, check_run_target
from llmkern.serve.client import Limits
from llmkern.serve.remote import Address, Remote, text_of
from llmkern.serve.server import Log
from llmkern.serve.session import Arriving, ServeOptions, arrive, planned
from llmkern.session import finish, recording

# A large model takes minutes to load.
_START_S, _LOOK_S, _STOP_S = 900.0, 0.5, 30.0


@dataclass(frozen=True)
class Asked:
    """A server by *address*, the numbers of this host's *gpus* that it runs on, and the *command* that starts it."""

    address: Address
    gpus: tuple[int, ...] = ()
    command: str | None = None


def serve_by_url(options: ServeOptions, asked: Asked, stages: Stages) -> Path:
    """Send the requests to a server by URL, record what its GPUs took, and return the run folder.

    Raises LlmkernError with a sentence for every cause that the user can do something about, a signal among them.
    """
    started_s = time.monotonic()
    target = options.trace.out
    if target is None:
        raise UsageError("a run by URL needs a folder: give --out.")
    check_output(target, [])
    check_run_target(target, options.trace.force)
    made = planned(options)
    prompts = [text_of(n, arrival.prompt_tokens, options.trace.seed) for n, arrival in enumerate(made.arrivals)]
    meters, device = _meters(asked.gpus)
    facts = RunFacts(
        command=without_home(shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])),
        started=datetime.now(UTC).isoformat(timespec="seconds"),
        # How the server computes is its own affair.
        options=replace(options.trace.facts(), precision="", weights="auto", annotate_only=False),
        device=device,
        host=environment.host(),
        versions=environment.versions(),
        labels={"arrivals": made.pattern, "requests": str(len(prompts)), "server": _plain(asked.address.url)}
        | {"asked": options.asked}
        | ({"gpus": ",".join(map(str, asked.gpus))} if asked.gpus else {}),
    )
    writer = RunWriter(target, facts, force=options.trace.force)
    with recording(writer, "this host ran out of memory: send fewer requests."), started(asked, stages):
        log = Log()
        server = Remote(asked.address, options.patience_s, log)
        server.start()
        try:
            with stages.stage("Warming up"):
                server.try_out(text_of(len(prompts), made.arrivals[0].prompt_tokens, options.trace.seed))
            clock = ClockWatch()
            rig = _rig(meters, writer, stages, options.trace, clock)
            with rig.metered():
                arrive(rig, Arriving(made, prompts, server, log, Limits(options.max_in_flight, options.patience_s)))
        finally:
            server.stop()
        writer.note(sensors={meter.name: meter.facts() for meter in meters})
        with signals.deferred():
            finish(writer, stages, elapsed_s=round(time.monotonic() - started_s, 3), clock=clock.facts())
    return target


def _plain(url: str) -> str:
    """Return *url* without a name and password in it."""
    head, slashes, rest = url.partition("://")
    return f"{head}{slashes}{rest.rpartition('@')[2]}"


def _rig(meters: list[EnergyMeter], writer: RunWriter, stages: Stages, options: TraceOptions, clock: ClockWatch) -> Rig:
    """Return a rig without device and model: they are the server's."""
    nothing = cast(Any, None)
    generation = cast(Any, SimpleNamespace(annotator=Annotator()))
    return Rig(nothing, tuple(meters), generation, nothing, writer, stages, options, clock)


def _meters(gpus: tuple[int, ...]) -> tuple[list[EnergyMeter], DeviceFacts]:
    """Return a meter for each GPU by its number in NVML, and what the first one is; raises DeviceError."""
    if not gpus:
        return [], DeviceFacts(kind="cpu", index=0, name="a server elsewhere")
    import pynvml

    from llmkern.record.device.nvml import NvmlMeter

    try:
        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(number) for number in gpus]
        told = [(pynvml.nvmlDeviceGetUUID(handle), pynvml.nvmlDeviceGetName(handle)) for handle in handles]
    except pynvml.NVMLError as error:
        raise DeviceError(
            f"--gpu {','.join(map(str, gpus))} cannot be read ({error}): give numbers that nvidia-smi shows, or leave "
            "it out where the server is elsewhere."
        ) from error
    meters: list[EnergyMeter] = [NvmlMeter(n, str(uuid)) for n, (uuid, _) in zip(gpus, told, strict=True)]
    return meters, DeviceFacts(kind="cuda", index=gpus[0], name=str(told[0][1]), uuid=str(told[0][0]))


@contextmanager
def started(asked: Asked, stages: Stages) -> Iterator[None]:
    """Start the server's command, wait until it answers, and stop it and its children in the end.

    Raises DeviceError where it ends by itself or does not answer.
    """
    if asked.command is None:
        yield
        return
    try:
        words = shlex.split(asked.command)
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    except (OSError, ValueError, IndexError) as error:
        raise UsageError(
            f"--start {asked.command!r} cannot be run ({error}): give a command with its arguments."
        ) from error
    try:
        with stages.stage("Starting the server"):
            _until_healthy(asked, process)
        yield
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_S)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _until_healthy(asked: Asked, process: subprocess.Popen[bytes]) -> None:
    begin_s = time.monotonic()
    while True:
        if process.poll() is not None:
            raise DeviceError(
                f"--start {asked.command!r} ended with exit code {process.returncode} before it served: run it by hand "
                "to see why."
            )
        probe = Remote(asked.address, 10.0, Log())
        try:
            probe.start()
            probe.stop()
            return
        except UsageError:
            # It answers, and something about the question is wrong.
            raise
        except DeviceError as error:
            if time.monotonic() - begin_s > _START_S:
                raise DeviceError(
                    f"--start {asked.command!r} does not answer at {asked.address.url} after {_START_S:.0f} s."
                ) from error
        signals.check()
        time.sleep(_LOOK_S)
