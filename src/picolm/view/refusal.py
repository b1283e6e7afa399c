"""Errors as answers: the status of each, and a sentence."""

from picolm.errors import PicoError, StoreError
from picolm.store.checkpoint import Missing


class Refused(PicoError):
    """An error of a request, with the status of its answer."""

    def __init__(self, message: str, status: int = 400):
        super().__init__(message)
        self.status = status


def status_of(error: PicoError) -> int:
    """Return the status of an answer: 404 for what is not there, 422 for what is damaged, 400 for other errors of a question."""
    if isinstance(error, Refused):
        return error.status
    return 404 if isinstance(error, Missing) else 422 if isinstance(error, StoreError) else 400
