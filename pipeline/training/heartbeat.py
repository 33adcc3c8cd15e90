"""The heart of a rank: it says what the rank is doing, and ends the run with a clear message when nothing moves.

Every rank keeps a small file, `work/heartbeats/00003`: what the rank began last, and beneath what a thread of its own
says about it every now and then. Such a thread needs neither the rank's main thread, which may hang in a collective for
ever, nor any other rank, which may be stopped.
"""

import faulthandler
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, Self

from pipeline.errors import Lost

BEAT_BYTES = 128  # the first part of a file, the rank's own; the rest is its watcher's
WATCH_BYTES = 384
CHECKS = 8  # of a watcher, in the time after which a rank counts as stalled
LONGEST_CHECK_S = 10.0
DUMP_S = 5.0  # what ranks that still run get to write their stacks and to agree on the reason
COLLECTIVES = (f"{os.sep}torch{os.sep}distributed{os.sep}", f"{os.sep}deepspeed{os.sep}comm{os.sep}")
STDERR = 2
END = "end"  # the phase of a rank that has come to its end
MOST_NAMED = 8  # ranks in a message


@dataclass(frozen=True)
class Pulse:
    """What is known of a rank.

    Attributes:
        place: How far it is, to be compared with other ranks: how often it went back, the step, and how many phases it
            began in that step. Every rank goes through the same phases.
        phase: What it does now.
        since: When it began that, in seconds since the epoch.
        alive: When its watcher last looked.
        waits: Whether its main thread waits for other ranks; null if that is not known.
        done: What its watcher has done about a stall: "" is nothing, then "dumped", then "left".
    """

    rank: int
    place: tuple[int, int, int] = (0, 0, 0)
    phase: str = "start"
    since: float = 0.0
    alive: float = 0.0
    waits: bool | None = None
    done: str = ""


class Heart:
    """Says at every phase of a step where a rank is, and watches that it goes on.

    When a rank has begun nothing for `timeout_s`, all ranks write the Python stacks of all their threads to standard
    error, `leave` the same reason, which names the rank that is furthest behind, and end with the status of
    `Lost`, after which the run may be begun again. A rank that is stopped or gone cannot; it is left to the launcher.
    """

    def __init__(
        self,
        directory: Path,
        rank: int,
        world: int,
        timeout_s: float,
        attempt: int,
        leave: Callable[[Lost], None],
        end: Callable[[int], NoReturn] = os._exit,
    ) -> None:
        """Begin to watch.

        Args:
            directory: Where the files of all ranks are; made if it is not there.
            attempt: The number of the try, so that nothing old is believed; 0 where nobody counts them.
            leave: Leaves the reason where the launcher finds it.
            end: Ends the process; the main thread cannot be asked to.
        """
        directory.mkdir(parents=True, exist_ok=True)
        self._directory, self._rank, self._world = directory, rank, world
        self._timeout_s, self._attempt, self._leave, self._end = timeout_s, attempt, leave, end
        self._verdict = directory / f"stalled-{attempt}"  # there once a rank has found that the run stalled
        self._main = threading.get_ident()
        self._turn = self._step = self._beats = 0
        self._file = os.open(directory / f"{rank:05d}", os.O_RDWR | os.O_CREAT, 0o644)
        self._watched: dict[str, Any] = {}
        if rank == 0:
            for old in directory.glob("stalled-*"):
                if old != self._verdict or not attempt:
                    old.unlink(missing_ok=True)
        self._write_watched(attempt=attempt)
        self.beat("start", 0)
        self._closing = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="heart", daemon=True)
        self._watcher.start()

    def beat(self, phase: str, step: int | None = None) -> None:
        """Say that a phase begins.

        Args:
            phase: Its name: ASCII, up to 32 characters.
            step: The step that it is of; null is the same as before. A smaller one means that the run went back.
        """
        if step is not None and step != self._step:
            if step < self._step:
                self._turn += 1
            self._step, self._beats = step, 0
        self._beats += 1
        self._moved = time.monotonic()
        text = f'["{phase}",{self._turn},{self._step},{self._beats},{time.time():.3f}]'
        os.pwrite(self._file, text.ljust(BEAT_BYTES).encode(), 0)

    def close(self) -> None:
        """Stop watching: this rank has come to its end, and is behind nobody."""
        self._closing.set()
        self._watcher.join()
        self._turn = 2**62
        self.beat(END)
        os.close(self._file)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _watch(self) -> None:
        """Look now and then whether this rank has moved, or another one has found that something stalled."""
        pause_s = min(self._timeout_s / CHECKS, LONGEST_CHECK_S)
        looked = time.monotonic()
        while not self._closing.wait(pause_s):
            now = time.monotonic()
            if now - looked > max(self._timeout_s / 2, 2 * pause_s):
                self._moved = now  # this process itself was stopped: what it waits for gets all of its time again
            looked = now
            self._write_watched()
            if self._verdict.exists():
                self._give_up(pause_s, first=False)
            elif now - self._moved > self._timeout_s:
                self._give_up(pause_s, first=_create(self._verdict))

    def _give_up(self, pause_s: float, first: bool) -> None:
        """Write the stacks, agree with the other ranks on the reason, leave it and end this process.

        Nobody ends before all have left the reason: who loses its peer ends too, with a worse one.
        """
        try:
            print(f"rank {self._rank}: the run has stalled; its Python stacks:", file=sys.stderr, flush=True)
            faulthandler.dump_traceback(STDERR, all_threads=True)
            waits = _is_waiting(sys._current_frames().get(self._main))
            self._write_watched(waits=waits, done="dumped")
            patience_s = 2 * pause_s + DUMP_S
            reason = self._conclude(patience_s) if first else self._hear(patience_s + DUMP_S)
            self._leave(
                Lost(f"{reason}; the stacks of those that answer are in their logs; the same command continues")
            )
            self._write_watched(done="left")
            self._wait_for(("left",), patience_s)
        except Exception:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            self._end(Lost.exit_status)

    def _conclude(self, patience_s: float) -> str:
        """Return the reason, and write it down for the other ranks."""
        pulses = self._wait_for(("dumped", "left"), patience_s)
        reason = blame(pulses, time.time(), self._timeout_s)
        temporary = self._verdict.with_name(f"{self._verdict.name}.tmp")
        temporary.write_text(reason, "utf-8")
        temporary.replace(self._verdict)
        return reason

    def _hear(self, patience_s: float) -> str:
        """Return the reason that another rank writes down, or a reason of its own if that rank never does."""
        deadline = time.monotonic() + patience_s
        while time.monotonic() < deadline:
            if text := self._verdict.read_text("utf-8"):
                return text
            self._wait()
        return blame(self._read(), time.time(), self._timeout_s)

    def _wait_for(self, wanted: Sequence[str], patience_s: float) -> list[Pulse]:
        """Return what is known of all ranks once those whose watchers run have done what is wanted."""
        deadline = time.monotonic() + patience_s
        while True:
            pulses, now = self._read(), time.time()
            late = [
                pulse
                for pulse in pulses
                if pulse.done not in wanted and _runs(pulse, now, self._timeout_s) and pulse.phase != END
            ]
            if not late or time.monotonic() > deadline:
                return pulses
            self._wait()

    def _wait(self) -> None:
        time.sleep(0.02)
        self._write_watched()

    def _read(self) -> list[Pulse]:
        return [read_pulse(self._directory, rank, self._attempt) for rank in range(self._world)]

    def _write_watched(self, **news: Any) -> None:
        self._watched |= {"alive": time.time(), **news}
        os.pwrite(self._file, json.dumps(self._watched).ljust(WATCH_BYTES).encode(), BEAT_BYTES)


def read_pulse(directory: Path, rank: int, attempt: int) -> Pulse:
    """Return what is known of a rank; of one that has not yet begun in this attempt next to nothing."""
    try:
        text = (directory / f"{rank:05d}").read_bytes()
        watched: Mapping[str, Any] = json.loads(text[BEAT_BYTES:])
        if watched["attempt"] != attempt:
            return Pulse(rank)
        phase, turn, step, beats, since = json.loads(text[:BEAT_BYTES])
    except (OSError, ValueError, LookupError):
        return Pulse(rank)
    told = {name: watched[name] for name in ("alive", "waits", "done") if name in watched}
    return Pulse(rank, (turn, step, beats), phase, since, **told)


def blame(pulses: Sequence[Pulse], now: float, timeout_s: float) -> str:
    """Say which ranks keep the others waiting, and in what they are.

    First those that do not run at all, then those that are furthest behind; of several, those that do not wait for
    other ranks themselves.
    """
    present = [pulse for pulse in pulses if pulse.phase != END]
    halted = [pulse for pulse in present if not _runs(pulse, now, timeout_s)]
    last = halted or [pulse for pulse in present if pulse.place == min(pulse.place for pulse in present)]
    guilty = [pulse for pulse in last if pulse.waits is False] or last
    one, several = min(guilty, key=lambda pulse: pulse.place), len(guilty) > 1
    names = ", ".join(str(pulse.rank) for pulse in guilty[:MOST_NAMED]) + (", …" if len(guilty) > MOST_NAMED else "")
    subject = f"ranks {names} of {len(pulses)} have" if several else f"rank {names} of {len(pulses)} has"
    limit = f"run.stall_timeout_s is {timeout_s:g}"
    if not one.since:
        return f"{subject} not begun; {limit}"
    where, ago = f"in phase '{one.phase}' of step {one.place[1]}", f"{now - one.since:.0f} s"
    if halted:
        return f"{subject} come to a halt (stopped, ended, or cut off): last seen {ago} ago {where}; {limit}"
    return f"{subject} been {where} for {ago}; {limit}"


def _runs(pulse: Pulse, now: float, timeout_s: float) -> bool:
    """Return whether a rank's watcher has looked lately, which it does even if the rank hangs."""
    return now - pulse.alive < timeout_s / 2


def _is_waiting(frame: FrameType | None) -> bool:
    """Return whether a stack is one of a collective, which waits for other ranks."""
    while frame is not None:
        if any(place in frame.f_code.co_filename for place in COLLECTIVES):
            return True
        frame = frame.f_back
    return False


def _create(path: Path) -> bool:
    """Create a file; return whether this process was the first."""
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644))
    except FileExistsError:
        return False
    return True
