import pytest
import torch
from tests.fox import fox, make_run  # noqa: F401

from picolm.models import Decoder, DecoderConfig


@pytest.fixture
def config() -> DecoderConfig:
    """Small enough to be instant; every width different, so that a mixed-up one shows."""
    return DecoderConfig(
        d_model=48,
        n_layers=3,
        vocab_size=101,
        max_seq_len=160,
        attention_n_heads=6,
        attention_n_kv_heads=2,
        activation_hidden_dim=80,
    )


@pytest.fixture
def model(config: DecoderConfig) -> Decoder:
    """With weights large enough that its predictions are far from uniform."""
    decoder = Decoder(config)
    decoder.init_parameters(torch.Generator().manual_seed(1))
    with torch.no_grad():
        for parameter in decoder.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8.0)
    return decoder


@pytest.fixture
def tokens(config: DecoderConfig) -> torch.Tensor:
    """[B, S] with S = 131 > two blocks of attention."""
    return torch.randint(0, config.vocab_size, (3, 131), generator=torch.Generator().manual_seed(2))
