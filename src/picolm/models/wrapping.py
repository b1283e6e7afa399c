"""What the models share behind the interface of transformers, which this file does not import."""

from dataclasses import fields
from typing import Any, TypeVar

Own = TypeVar("Own")


def take_fields(config: Any, own: type, options: dict[str, Any]) -> None:
    """Move the fields of a configuration of ours from the options to that of transformers; defaults for those not given.

    A base class cannot do it: transformers 5 makes an `__init__` for each configuration without one of its own.
    """
    for field in fields(own):
        if field.name != "model_type":
            setattr(config, field.name, options.pop(field.name, field.default))


def own_config(config: Any, own: type[Own]) -> Own:
    """Return the configuration of ours that a configuration of transformers holds the fields of."""
    return own(**{field.name: getattr(config, field.name) for field in fields(own)})  # type: ignore[arg-type]


class Embeddings:
    """What transformers asks of the embedding and the output layer of a model of ours."""

    base_model_prefix: str

    @property
    def _own(self) -> Any:
        return getattr(self, self.base_model_prefix)

    def get_input_embeddings(self) -> Any:
        return self._own.embedding_proj

    def set_input_embeddings(self, value: Any) -> None:
        self._own.embedding_proj = value

    def get_output_embeddings(self) -> Any:
        return self._own.de_embedding_proj

    def set_output_embeddings(self, new_embeddings: Any) -> None:
        self._own.de_embedding_proj = new_embeddings


def check_others(others: dict[str, Any], model: str) -> None:
    """Raise TypeError for an argument that would change nothing here, so that none is ignored in silence."""
    for name, value in others.items():
        if value is not None and value is not False:
            raise TypeError(f"{model}.forward() got an unexpected keyword argument {name!r}; leave it out")
