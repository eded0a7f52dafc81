"""A progress bar on a terminal for planning that takes long."""

import contextlib

from tqdm import tqdm

__all__ = ["Progress"]


SECONDS = 2  # what takes no longer shows no bar


class Progress:
    """`with progress("planning"):` shows how many modules are walked within, where stderr is a terminal; one within
    another one renames that one's bar for as long. `walked` counts a module."""

    def __init__(self):
        self._bar, self._what = None, []

    @contextlib.contextmanager
    def __call__(self, what):
        if self._bar is None:
            self._bar = tqdm(unit=" walks", delay=SECONDS, miniters=1, leave=False, disable=None)
        self._what.append(what)
        self._bar.set_description_str(what, refresh=False)
        try:
            yield
        finally:
            self._what.pop()
            if self._what:
                self._bar.set_description_str(self._what[-1], refresh=False)
            else:
                self._bar.close()
                self._bar = None

    def walked(self):
        if self._bar is not None:
            self._bar.update()
