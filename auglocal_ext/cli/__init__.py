"""The command line, `auglocal`, and what the programs in python/ share with it."""

from .program import main

__all__ = ["main"]
