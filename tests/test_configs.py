"""Every shipped YAML file loads."""

from pathlib import Path

import pytest

from picolm.schema import load
from picolm.train.config import schema_for
from picolm.train.preview import preview

CONFIGS = Path(__file__).parents[1] / "configs"
PARAMETERS = {
    "pico-decoder-tiny": "11,282,784 (1,624,416 without embeddings)",
    "pico-decoder-small": "64,595,328 (25,961,856 without embeddings)",
    "pico-decoder-medium": "181,095,168 (103,828,224 without embeddings)",
    "pico-decoder-large": "569,808,384 (415,274,496 without embeddings)",
}


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda file: file.stem)
def test_a_shipped_configuration_loads_and_can_be_previewed(file: Path) -> None:
    text = preview(load(file, schema_for))
    assert "saved steps" in text
    assert PARAMETERS.get(file.stem, "") in text


def test_the_published_sizes_are_all_shipped() -> None:
    assert {file.stem for file in CONFIGS.glob("*.yaml")} >= {*PARAMETERS, "demo"}
