"""What is measured while training has closed forms, expectations and independent computations to be compared with."""

import json
import math
import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch

from picolm.models import Decoder, DecoderConfig
from picolm.train import metrics
from picolm.train.metrics import WINDOW, Meters, Stopwatch, UpdateSize, group_of
from picolm.train.sample import load_model


def after(losses: list[float]) -> Meters:
    seen = Meters()
    for loss in losses:
        seen.observe_loss(loss)
    return seen


STEADY = [1.0, 3.0] * (WINDOW // 2)  # mean 2, standard deviation 1


def test_a_spike_is_beyond_six_standard_deviations_above_the_mean() -> None:
    assert not after(STEADY).observe_loss(7.999)
    assert after(STEADY).observe_loss(8.001)
    assert not after(STEADY).observe_loss(-100.0)


def test_nothing_is_a_spike_before_the_window_is_full() -> None:
    assert not after(STEADY[:-1]).observe_loss(1e9)
    assert after(STEADY[:-1]).spikes == 0


def test_the_window_moves_on() -> None:
    seen = after(STEADY)
    for _ in range(WINDOW):
        seen.observe_loss(50.0 + _ % 2)
    assert seen.spikes >= 1
    assert not seen.observe_loss(52.0)


def test_a_loss_that_is_not_finite_is_told_and_forgotten() -> None:
    seen = after(STEADY)
    assert seen.observe_loss(math.inf)
    assert not seen.observe_loss(math.nan)
    assert list(seen.losses) == STEADY
    assert seen.spikes == 1


SIGNAL, NOISE, SMALL, LARGE, WIDTH = 4.0, 90.0, 3, 12, 40


def gradient_norms(generator: torch.Generator) -> tuple[float, float]:
    """Of one micro-batch and of the batch it is part of; per sequence the noise has the trace NOISE."""
    per_row = torch.randn(LARGE, WIDTH, generator=generator, dtype=torch.float64) * math.sqrt(NOISE / WIDTH)
    per_row += math.sqrt(SIGNAL / WIDTH)
    return per_row[:SMALL].mean(0).norm().item(), per_row.mean(0).norm().item()


def test_the_estimates_of_signal_and_noise_are_unbiased() -> None:
    generator, signals, noises = torch.Generator().manual_seed(0), [], []
    for _ in range(3000):
        small, large = gradient_norms(generator)
        one = Meters()
        one.observe_noise(SMALL, small, LARGE, large)
        signals.append(one.signal)
        noises.append(one.noise)
    for estimates, truth in ((signals, SIGNAL), (noises, NOISE)):
        error = statistics.stdev(estimates) / math.sqrt(len(estimates))
        assert abs(statistics.mean(estimates) - truth) < 4 * error
        assert error < 0.05 * truth


def test_the_noise_scale_averages_numerator_and_denominator_apart() -> None:
    generator, seen = torch.Generator().manual_seed(0), Meters()
    pairs = []
    for _ in range(400):
        small, large = gradient_norms(generator)
        seen.observe_noise(SMALL, small, LARGE, large)
        one = Meters()
        one.observe_noise(SMALL, small, LARGE, large)
        pairs.append((one.signal, one.noise))
    weights = [metrics.DECAY**age for age in range(399, -1, -1)]
    signal, noise = (sum(w * pair[i] for w, pair in zip(weights, pairs)) / sum(weights) for i in (0, 1))
    assert seen.signal == pytest.approx(signal, rel=0.02)  # older samples than 128 have a weight of 0.14 % together
    assert seen.noise == pytest.approx(noise, rel=0.02)
    assert seen.noise_scale() == seen.noise / seen.signal
    assert 5 < seen.noise_scale() < 100  # 22.5 with the noise of some 40 effective measurements


@pytest.mark.parametrize("samples", [2, 5, 20, 60])
def test_the_first_sample_has_no_special_weight(samples: int) -> None:
    values = [float(i % 3) for i in range(samples)]
    weights = [0.95**age for age in range(samples - 1, -1, -1)]
    expected = sum(w * x for w, x in zip(weights, values)) / sum(weights)
    assert metrics.recent_mean(values) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("place", [0, 7, 60, 119])
@pytest.mark.parametrize("factor", [1e2, 1e8])
def test_an_outlier_does_not_take_the_noise_scale_away(place: int, factor: float) -> None:
    """One batch whose gradient is large: what was logged before lost the scale for the rest of 120 steps."""
    generator, seen, found = torch.Generator().manual_seed(1), Meters(), []
    for step in range(120):
        small, large = gradient_norms(generator)
        if step == place:
            small, large = small * factor, large
        seen.observe_noise(SMALL, small, LARGE, large)
        found.append((seen.signal, seen.noise))
    late = [(signal, noise) for step, (signal, noise) in enumerate(found) if step > 20 and step > place]
    for signal, noise in late or found[-1:]:
        assert signal > 0
        assert noise == pytest.approx(NOISE, rel=0.5)


def test_clipping_outliers_does_not_move_the_averages_of_ordinary_samples() -> None:
    generator, signals, noises = torch.Generator().manual_seed(2), [], []
    for _ in range(60):
        seen = Meters()
        for _ in range(80):
            small, large = gradient_norms(generator)
            seen.observe_noise(SMALL, small, LARGE, large)
        signals.append(seen.signal)
        noises.append(seen.noise)
    for estimates, truth in ((signals, SIGNAL), (noises, NOISE)):
        error = statistics.stdev(estimates) / math.sqrt(len(estimates))
        assert abs(statistics.mean(estimates) - truth) < 4 * error + 0.01 * truth


def test_there_is_no_noise_scale_where_it_cannot_be_told() -> None:
    seen = Meters()
    assert seen.noise_scale() is None
    seen.observe_noise(1, 1.0, 2, 0.1)  # an estimate of the squared signal below zero
    assert seen.signal < 0
    assert seen.noise_scale() is None
    before = seen.meta()
    for small, large in ((math.nan, 1.0), (math.inf, 1.0), (1e200, 1e200)):
        seen.observe_noise(1, small, 2, large)
    assert seen.meta() == before


def test_meters_go_on_where_they_were() -> None:
    losses = [2 + math.sin(step) for step in range(300)]
    losses[200] = 100.0
    whole, first, second = Meters(), Meters(), Meters()
    for step, loss in enumerate(losses):
        for seen in (whole, first if step < 170 else second):
            seen.observe_loss(loss)
            seen.observe_noise(1, 2 + loss, 8, 1 + loss)
        if step == 169:
            second.restore(json.loads(json.dumps(first.meta())))
    assert second.meta() == whole.meta()
    assert second.spikes == 1


def test_the_noise_scale_of_a_run_follows_from_gradients_computed_apart(train: Callable[..., Any]) -> None:
    run = train(
        "training.max_steps=0", "data.dataset.shuffle=true", "training.optimization.gradient_accumulation_steps=2"
    )
    model, tokens_RS = load_model(run, 0), torch.tensor(run[0].rows("train")["input_ids"].to_pylist())
    squares = []
    for rows_RS in (tokens_RS[:4], tokens_RS):
        model.zero_grad()
        loss = model.loss(rows_RS)
        (loss.nats / loss.tokens).backward()
        squares.append(sum(p.grad.double().square().sum().item() for p in model.parameters()))
    small, large = squares
    signal, noise = (8 * large - 4 * small) / 4, (small - large) / (1 / 4 - 1 / 8)
    assert (signal > 0) is (noise > 0) is True  # else this step would log none
    assert run.metrics()[-1]["noise_scale"] == pytest.approx(noise / signal, rel=1e-4)
    assert run.metrics()[-1]["noise_scale/S"] == pytest.approx(noise, rel=1e-4)
    assert run.metrics()[-1]["noise_scale/G2"] == pytest.approx(signal, rel=1e-4)
    assert run.metrics()[-1]["grad_norm"] == pytest.approx(math.sqrt(large), rel=1e-5)


@pytest.mark.slow
def test_a_run_says_once_why_it_has_no_noise_scale(
    train: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    run = train("training.optimization.gradient_accumulation_steps=1")
    assert not [entry for entry in run.metrics() if "noise_scale" in entry]
    said = capsys.readouterr().err
    assert said.count("No noise_scale: it compares gradients of two batch sizes") == 1
    assert "Set training.optimization.gradient_accumulation_steps to 2 or more" in said


@pytest.mark.slow
def test_both_parts_are_logged_where_their_quotient_is_not(
    train: Callable[..., Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Meters, "noise_scale", lambda self: None)
    lines = [entry for entry in train().metrics() if "train/loss" in entry]
    assert all({"noise_scale/S", "noise_scale/G2"} <= set(entry) for entry in lines)
    assert capsys.readouterr().err.count("noise_scale = S / G2 is left out where") == 1


def test_update_ratios_are_those_of_the_groups() -> None:
    model = Decoder(DecoderConfig(d_model=8, n_layers=2, attention_n_heads=2, attention_n_kv_heads=1, vocab_size=16,
                                  activation_hidden_dim=12, max_seq_len=4))  # fmt: skip
    with torch.no_grad():
        model.output_norm.weight.zero_()
    old = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    sizes = UpdateSize(model)
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            parameter.add_(torch.full_like(parameter, 0.01 * index))
    ratios = sizes.ratios()
    for group in ratios:
        names = [name for name in old if group_of(name) == group]
        change = torch.cat([(dict(model.named_parameters())[name].detach() - old[name]).flatten() for name in names])
        size = torch.cat([old[name].flatten() for name in names]).norm()
        assert ratios[group] == pytest.approx((change.norm() / size).item(), rel=1e-5)
    assert ratios["output_norm"] == math.inf
    assert ratios["embedding_proj"] == 0
    assert len([name for name in old if group_of(name) == "attention"]) == 8


def test_the_update_ratio_of_a_run_is_that_of_its_checkpoints(train: Callable[..., Any]) -> None:
    run = train("training.max_steps=1", "checkpointing.save_every_n_steps=1", "monitoring.logging.log_every_n_steps=1")
    before, after = run[0], run[1]
    squares = [0.0, 0.0]
    for address in before.select(kind="weights", module="*.attention.*"):
        squares[0] += (after[address].double() - before[address].double()).square().sum().item()
        squares[1] += before[address].double().square().sum().item()
    entry = next(entry for entry in run.metrics() if "train/loss" in entry)
    assert entry["update_ratio/attention"] == pytest.approx(math.sqrt(squares[0] / squares[1]), rel=1e-4)
    assert not [
        name for name in run.metrics()[-1] if name.startswith("update_ratio/")
    ]  # no update follows the last step


def test_the_phases_of_a_stopwatch_do_not_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now[0])
    watch = Stopwatch()
    for _ in range(2):
        with watch.time("capture"):
            now[0] += 1
            with watch.time("forward"):
                now[0] += 3
            now[0] += 2
        now[0] += 4
        watch.steps += 1
    assert watch.report() == (20, 2, {"forward": 3, "capture": 3})
    now[0] += 5
    assert watch.report() == (5, 0, {})
