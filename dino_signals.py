"""Signals that ask a run to save and end, also while it waits for a batch."""

import multiprocessing
import signal
import sys
import threading
import time

import utils
from utils import Stopped, UserError

GRACE = 5.0  # seconds


class Watched:
    """A data loader that is given up some seconds after a signal, such as one whose file system does not answer."""

    def __init__(self, loader, stop):
        self.loader, self.stop = loader, stop

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        self.stop.wait()
        for batch in self.loader:
            self.stop.waiting = False
            yield batch
            self.stop.wait()
        self.stop.waiting = False


class StopRequest:
    """Notes SIGTERM, SIGINT, SIGHUP, SIGUSR1 and SIGUSR2, so that a run can finish its step and save before it ends.

    A context manager; `signal` is the number of the first signal, 0 before. A second SIGINT interrupts at once, but not
    within a second of the first: launchers pass on a Ctrl-C that the terminal has sent to the processes already.
    """

    def __enter__(self):
        self.signal, self.noted, self.interrupted, self.before, self.waiting = 0, set(), None, {}, False
        self.children = set(multiprocessing.active_children())
        if threading.current_thread() is threading.main_thread():  # only the main thread can handle signals
            for number in utils.STOP_SIGNALS:
                if not utils.is_nohup(number):
                    self.before[number] = signal.signal(number, self.note)
        return self

    def __exit__(self, error=None, *_):
        # From here on all processes end together, and launchers send SIGTERM to the rest when the first has ended. It
        # must not change the exit code, from which a job script decides whether to requeue.
        self.waiting = False
        if self.signal and hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, 0)  # Python's exit would take SIGALRM for the end
        agreed = error is None or issubclass(error, (UserError, Stopped))
        ending = agreed and self.before.get(signal.SIGTERM) is utils.terminate
        for number, handler in self.before.items():
            if ending and number != signal.SIGINT:
                handler = signal.SIG_IGN
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self.kill_loaders()

    def kill_loaders(self):
        """Kill the loader processes. Python would send them SIGTERM at exit, which they ignore, and wait forever."""
        main = hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread()
        before = signal.signal(signal.SIGCHLD, signal.SIG_DFL) if main else None  # torch's handler would raise
        for child in set(multiprocessing.active_children()) - self.children:
            child.kill()
            child.join()
        if main:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL if before is None else before)

    def note(self, number, _):
        if number == signal.SIGINT:
            now = time.monotonic()
            if self.interrupted is not None and now - self.interrupted > 1:
                raise KeyboardInterrupt
            self.interrupted = self.interrupted or now
        self.signal = self.signal or number
        self.noted.add(number)
        if number == getattr(signal, "SIGHUP", None):  # the terminal is gone
            utils.mute()
        if self.waiting:
            self.wait()

    def wait(self):
        """A wait for a batch begins, or a signal has come in it. Several processes can't give up one by one."""
        self.waiting = True
        alone = utils.get_world_size() == 1 and threading.current_thread() is threading.main_thread()
        if self.signal and alone and hasattr(signal, "setitimer"):
            signal.signal(signal.SIGALRM, self.give_up)
            signal.setitimer(signal.ITIMER_REAL, GRACE)

    def give_up(self, *_):
        if self.waiting:
            raise Stopped(self.signal)

    def watch(self, data_loader):
        """The batches of a loader. Raises Stopped if a signal is GRACE seconds old and the batch still not there."""
        return Watched(data_loader, self)

    def leave(self, number):
        """Exit as signal `number` asks: through its earlier handler, such as submitit's, or with code 128 + number.

        The earlier handlers of other signals that have arrived run too: Slurm may send SIGTERM, then SIGUSR2.
        """
        for each in sorted({number, *self.noted}):
            handler = self.before.get(each)
            if callable(handler) and handler not in (signal.default_int_handler, utils.terminate):
                self.__exit__()
                handler(each, None)
        utils.leave_processes()
        sys.exit(128 + number)
