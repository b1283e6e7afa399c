"""Errors that the user can act on: the command line shows them as a message, not as a traceback."""


class PicoError(Exception):
    """An error that the user can act on. The message says what is wrong, where, and what to do."""

    exit_code = 1


class DataError(PicoError):
    """An error in a corpus, a shard or a token; the message names the file and the row."""


class StoreError(PicoError):
    """An error in a run or a checkpoint on disk; the message names the path."""


class FileError(StoreError, DataError):
    """An error for a file of a run, a corpus or a cache that cannot be used; the message names the path."""


class FileMissing(FileError):
    """An error for a file that does not exist."""
