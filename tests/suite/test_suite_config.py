"""A suite is its base and what differs; what must not differ does not; every problem has its file and line."""

from collections.abc import Callable
from pathlib import Path

import pytest

from picolm.schema import ConfigError, flatten, load, plain
from picolm.suite.config import differing, load_suite
from picolm.train.config import schema_for

CONFIGS = Path(__file__).parents[2] / "configs"
NAMES = ("checkpointing.run_name", "training.seeds.init")


def test_members_are_all_combinations_and_differ_in_nothing_else(toy_suite: Callable[..., Path]) -> None:
    suite = load_suite(toy_suite("matrix: {size: {s: {model.d_model: 24}, m: {model: {d_model: 32}}}, seed: [1, 2]}"))
    assert [member.name for member in suite.members] == [
        "toys-s-seed1",
        "toys-s-seed2",
        "toys-m-seed1",
        "toys-m-seed2",
    ]
    assert suite.members[3].labels == {"size": "m", "seed": "2"}
    assert differing(suite.members) == {"model.d_model": [24, 32], "training.seeds.init": [1, 2]}


def test_any_key_can_be_an_axis(toy_suite: Callable[..., Path]) -> None:
    suite = load_suite(toy_suite("matrix: {training.optimization.lr: [0.01, 2e-05], seed: [0]}"))
    assert [m.name for m in suite.members] == ["toys-lr0.01-seed0", "toys-lr2e-05-seed0"]
    assert [m.config.training.optimization.lr for m in suite.members] == [0.01, 2e-05]


def test_a_suite_without_a_matrix_is_one_run(toy_suite: Callable[..., Path]) -> None:
    assert [member.name for member in load_suite(toy_suite("")).members] == ["toys"]


def test_overrides_reach_every_member_and_the_suite_itself(toy_suite: Callable[..., Path]) -> None:
    suite = load_suite(toy_suite(), ["overrides.training.max_steps=4", "suite_name=other"])
    assert {member.config.training.max_steps for member in suite.members} == {4}
    assert suite.members[0].name == "other-small"
    assert suite.analysis is not None
    assert suite.analysis.monitoring.output_dir.endswith("suites/other")


def problems_of(file: Path, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as raised:
        load_suite(file, overrides)
    return [str(problem).replace(str(file.parent) + "/", "") for problem in raised.value.problems]


def test_problems_of_members_are_told_at_once_with_the_line_of_the_suite(toy_suite: Callable[..., Path]) -> None:
    file = toy_suite("""matrix:
  size:
    small: {model.d_modell: 24}
    wide:
      model:
        d_model: 32
        n_layers: many
overrides: {training: {max_steps: -1}}""")
    (file.parent / "analysis.yaml").write_text("metrics: [{metric_name: ckaa}]\n")
    found = problems_of(file)
    assert found[0] == ("suite.yaml:12: training.max_steps: -1: should be greater than or equal to 0. Updates in all.")
    assert "suite.yaml:7: model.d_modell: unknown key; did you mean 'd_model'?" in found
    assert any(line.startswith("suite.yaml:11: model.n_layers: ") for line in found)
    assert found[-1].startswith("analysis.yaml:1: metrics.0.metric_name: unknown metric 'ckaa'; did you mean 'cka'?")
    assert len(found) == 4


def test_problems_of_the_suite_itself(toy_suite: Callable[..., Path]) -> None:
    found = problems_of(toy_suite("matrix: {seed: [1, 1], size: {}}\nrun_name: x-{sise}\nbas: y"))
    assert found == [
        "suite.yaml:7: bas: unknown key; did you mean 'base'?",
        "suite.yaml:5: matrix.seed: 1 stands there twice",
        "suite.yaml:5: matrix: the axis 'size' has no values",
        "suite.yaml:6: run_name: {sise} is no axis of the matrix (there are: seed, size)",
    ]


def test_a_base_that_is_not_there(toy_suite: Callable[..., Path]) -> None:
    assert problems_of(toy_suite(""), "base=toys.yaml") == [
        "toys.yaml: there is no such file; did you mean 'toy.yaml'?"
    ]


def test_data_order_and_optimizer_are_the_same_for_all(toy_suite: Callable[..., Path]) -> None:
    sizes = "matrix: {size: {s: {model.d_model: 24}, m: {training.optimization.lr: 0.1, training.seeds.data: 7}}}"
    assert problems_of(toy_suite(sizes)) == [
        "suite.yaml:5: training.seeds.data: training.seeds.data differs between members (42, 7) and has to be the same; make "
        "it an axis of its own (`training.seeds.data: […]`), or take it out of `same`",
        "suite.yaml:5: training.optimization.lr: training.optimization.lr differs between members (0.01, 0.1) and has to be "
        "the same; make it an axis of its own (`training.optimization.lr: […]`), or take it out of `same`",
    ]
    assert len(load_suite(toy_suite(sizes), ["same=[]"]).members) == 2
    micro = "matrix: {size: {s: {}, m: {training.optimization.gradient_accumulation_steps: 4}}}"
    assert len(load_suite(toy_suite(micro)).members) == 2  # the result does not depend on it


def test_names_are_unique(toy_suite: Callable[..., Path]) -> None:
    (found,) = problems_of(toy_suite("matrix: {seed: [1, 2]}\nrun_name: mine"))
    assert found == (
        "suite.yaml:6: run_name: several members are called mine; put every axis into the name: toys-{seed}"
    )


@pytest.mark.parametrize(("suite", "family"), [("nano", "pico-nano-{}"), ("scaling", "pico-decoder-{}")])
def test_the_shipped_suites_train_the_shipped_configurations(suite: str, family: str) -> None:
    for member in load_suite(CONFIGS / "suites" / f"{suite}.yaml").members:
        alone = load(CONFIGS / f"{family.format(member.labels['size'])}.yaml", schema_for)
        ours, theirs = flatten(plain(member.config)), flatten(plain(alone))
        assert {key for key in ours if ours[key] != theirs[key]} <= set(NAMES)


def test_the_suite_of_architectures_has_the_shipped_models() -> None:
    suite = load_suite(CONFIGS / "suites" / "architectures.yaml")
    families = {"decoder": "pico-nano", "diffusion": "pico-diffusion-nano", "statespace": "pico-statespace-nano"}
    for member in suite.members:
        architecture, size = member.labels["model"].split("-")
        alone = load(CONFIGS / f"{families[architecture]}-{size}.yaml", schema_for)
        assert member.config.model == alone.model
        steps, rows = member.config.training.max_steps, int(member.config.data.dataset.name[6:].partition(",")[0])
        epochs = steps * member.config.data.dataloader.batch_size / rows
        assert epochs == {"once": 1, "often": 16}[member.labels["rows"]]


@pytest.mark.slow
def test_the_shipped_sizes_are_what_they_are_called() -> None:
    from picolm.train.preview import estimate

    named = {"300k": 3e5, "1m": 1e6, "3m": 3e6, "10m": 1e7}
    for name, size in named.items():
        assert estimate(load(CONFIGS / f"pico-nano-{name}.yaml", schema_for)).parameters == pytest.approx(
            size, rel=0.15
        )
