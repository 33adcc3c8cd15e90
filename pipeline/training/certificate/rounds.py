"""All trials of a certificate, one after another, on fewer and fewer of the same processes."""

import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import groupby

import torch

from pipeline.errors import Preempted
from pipeline.parallel.engine import process_group
from pipeline.parallel.mesh import Mesh
from pipeline.stage import Context
from pipeline.training.certificate.chance import try_chance
from pipeline.training.certificate.layouts import Layout
from pipeline.training.certificate.trial import Trial, train_plainly, train_under
from pipeline.training.certificate.verdict import BOUNDS, Row, heading, judge, line

BF16_STEPS = 8  # at most: what is rounded so coarsely ends anywhere after many
TIMEOUT_FACTOR = 1.5  # of the stall's timeout, which is to be the first to strike


def certify(ctx: Context, trial: Trial, layouts: Sequence[Layout], steps: int) -> list[Row]:
    """Train under each layout and compare; return the rows of the certificate, on ranks other than 0 nothing.

    Args:
        layouts: Those with most ranks first.

    Raises:
        Preempted: If a stop was asked for.
    """
    lengths = {layout: min(steps, BF16_STEPS) if layout.precision == "bf16" else steps for layout in layouts}
    plain = train_plainly(trial, [0, *sorted(set(lengths.values()))]) if ctx.rank == 0 else {}
    width = max(len(layout.name) for layout in layouts)
    rows: list[Row] = []
    ctx.log(f"{len(layouts)} layouts, against one process in plain torch; errors of weights: of what they learned")
    for precision, bound in BOUNDS.items():
        most = f"{bound.loss:.0e} in losses, {bound.grad_norm:.0e} in norms, {bound.weights:.0e} in weights"
        ctx.log(f"{precision}: at most {most}")
    ctx.log(heading(width))
    progress = ctx.progress(len(layouts), "layouts")
    for mesh, some in _meetings(ctx, layouts):
        for layout in some:
            _stop_if_asked(ctx, mesh)
            began = time.perf_counter()
            try:
                trace = train_under(trial, layout, mesh, lengths[layout])
            except Exception as error:
                error.add_note(f"while training under the layout '{layout.name}'")
                raise
            progress.advance()
            if ctx.rank == 0:
                seconds = time.perf_counter() - began
                rows.append(judge(layout, trace, plain[lengths[layout]], plain[0], seconds))
                ctx.log(line(rows[-1], width))
        for row in try_chance(trial, mesh):
            rows.append(row)
            ctx.log(line(row, width))
    progress.close()
    return rows if ctx.rank == 0 else []


def _meetings(ctx: Context, layouts: Sequence[Layout]) -> Iterator[tuple[Mesh, list[Layout]]]:
    """Yield the mesh of each number of ranks and degree of tensor parallelism, with its layouts.

    The processes that are too many are done: numbers of ranks only fall. The first mesh has all ranks, and meets where
    the launcher says; there rank 0 says where the others will meet.
    """
    groups = [(key, list(some)) for key, some in groupby(layouts, key=lambda layout: (layout.world, layout.tensor))]
    timeout = timedelta(seconds=ctx.settings.stall_timeout_s * TIMEOUT_FACTOR)
    places: list[str | None] = [None] * len(groups)
    for number, ((world, tensor), some) in enumerate(groups):
        if ctx.rank >= world:
            return
        with _world(world), process_group(tensor, timeout, places[number]) as mesh:
            if number == 0:
                ports = mesh.sum_all(_free_ports(len(groups) - 1, ctx.rank), _device())
                host = os.environ["MASTER_ADDR"]
                places[1:] = [f"tcp://{host}:{port:.0f}" for port in ports]
            yield mesh, some


@contextmanager
def _world(size: int) -> Iterator[None]:
    """Let this process be one of `size` for the time of the block."""
    before = os.environ.get("WORLD_SIZE")
    os.environ["WORLD_SIZE"] = str(size)
    try:
        yield
    finally:
        if before is None:
            del os.environ["WORLD_SIZE"]
        else:
            os.environ["WORLD_SIZE"] = before


def _free_ports(count: int, rank: int) -> list[float]:
    """Return ports that nobody uses on the machine of rank 0; zeros on the others."""
    if rank != 0:
        return [0.0] * count
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("", 0))
        return [float(probe.getsockname()[1]) for probe in probes]
    finally:
        for probe in probes:
            probe.close()


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def _stop_if_asked(ctx: Context, mesh: Mesh) -> None:
    (stops,) = mesh.sum_all([ctx.should_stop()], _device())
    if stops:
        raise Preempted(f"{ctx.task}: nothing of a certificate is kept before its end")
