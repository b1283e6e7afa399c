"""What the user did, or what the world did to the user: shown as a message, never as a traceback."""


class PicoError(Exception):
    """A problem the user can act on. The message says what is wrong, where, and what to do; the command line prints it alone."""

    exit_code = 1


class DataError(PicoError):
    """Something about a corpus, a shard or a token; names the file and the row."""


class StoreError(PicoError):
    """Something about a run or a checkpoint on disk; names the path."""


class FileError(StoreError, DataError):
    """A file of a run, a corpus or a cache that cannot be used: runs and corpora both consist of files. Names the path."""


class FileMissing(FileError):
    """A file that does not exist."""
