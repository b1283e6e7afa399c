"""Every shipped YAML file loads."""

from pathlib import Path

import pytest

from picolm.schema import load
from picolm.suite.config import load_suite
from picolm.train.config import schema_for
from picolm.train.preview import preview

CONFIGS = Path(__file__).parents[1] / "configs"
PARAMETERS = {
    "pico-decoder-tiny": "11,282,784 (1,624,416 without embeddings)",
    "pico-decoder-small": "64,595,328 (25,961,856 without embeddings)",
    "pico-decoder-medium": "181,095,168 (103,828,224 without embeddings)",
    "pico-decoder-large": "569,808,384 (415,274,496 without embeddings)",
    "pico-nano-300k": "261,972 (114,516 without embeddings)",
    "pico-nano-1m": "966,084 (622,020 without embeddings)",
    "pico-nano-3m": "3,174,024 (2,485,896 without embeddings)",
    "pico-nano-10m": "9,848,280 (8,570,328 without embeddings)",
    "pico-statespace-tiny": "11,276,736 (1,618,368 without embeddings)",
    "pico-statespace-small": "64,476,712 (25,843,240 without embeddings)",
    "pico-statespace-medium": "182,696,672 (105,429,728 without embeddings)",
    "pico-statespace-large": "564,570,560 (410,036,672 without embeddings)",
    "pico-statespace-nano-300k": "261,036 (113,580 without embeddings)",
    "pico-statespace-nano-1m": "965,532 (621,468 without embeddings)",
    "pico-statespace-nano-3m": "3,157,536 (2,469,408 without embeddings)",
    "pico-statespace-nano-10m": "9,819,120 (8,541,168 without embeddings)",
    "pico-diffusion-tiny": "11,282,880 (1,624,416 without embeddings)",
    "pico-diffusion-small": "64,595,712 (25,961,856 without embeddings)",
    "pico-diffusion-medium": "181,095,936 (103,828,224 without embeddings)",
    "pico-diffusion-large": "569,809,920 (415,274,496 without embeddings)",
    "pico-diffusion-nano-300k": "262,008 (114,516 without embeddings)",
    "pico-diffusion-nano-1m": "966,168 (622,020 without embeddings)",
    "pico-diffusion-nano-3m": "3,174,192 (2,485,896 without embeddings)",
    "pico-diffusion-nano-10m": "9,848,592 (8,570,328 without embeddings)",
}


@pytest.mark.slow
@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda file: file.stem)
def test_a_shipped_configuration_loads_and_can_be_previewed(file: Path) -> None:
    text = preview(load(file, schema_for))
    assert "saved steps" in text
    assert PARAMETERS.get(file.stem, "") in text


def test_the_sizes_are_all_shipped() -> None:
    assert {file.stem for file in CONFIGS.glob("*.yaml")} >= {*PARAMETERS, "demo"}


@pytest.mark.parametrize("file", sorted((CONFIGS / "suites").glob("*.yaml")), ids=lambda file: file.stem)
def test_a_shipped_suite_loads_with_its_analysis(file: Path) -> None:
    suite = load_suite(file)
    assert len(suite.members) >= 4
    assert suite.analysis is not None
