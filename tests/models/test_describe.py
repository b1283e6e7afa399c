"""What a card says of a model comes from the model."""

from typing import Any

from picolm.models import Decoder, block_count, describe


def test_a_model_is_described_by_the_numbers_of_its_anatomy(model: Decoder) -> None:
    found = describe(model)
    assert found.pop("parameters") == sum(p.numel() for p in model.parameters())
    assert found == {"layers": 3, "width": 48, "heads": 6, "kv heads": 2, "head size": 8, "vocabulary": 101}


def test_one_that_has_something_else_to_say_says_it(model: Decoder) -> None:
    class Own(Decoder):
        def describe(self) -> dict[str, Any]:
            return {"states": 16}

    assert describe(Own(model.config)) == {"states": 16}


def test_a_configuration_may_call_its_number_of_blocks_otherwise(model: Decoder) -> None:
    class Deep:
        blocks_key = "depth"
        depth = 7

    assert block_count(Deep()) == ("depth", 7)
    assert block_count(model.config) == ("n_layers", 3)
    assert block_count(object()) is None
