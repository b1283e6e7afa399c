"""Which runs are seeds of one configuration: runs whose configurations differ only in seeds and names."""

import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from picolm.errors import StoreError
from picolm.schema import flatten

if TYPE_CHECKING:
    from picolm.store import Run

DECISIVE = ("data", "model", "training")  # these decide what is computed; others only where, and what is logged
FREE = ("training.seeds.",)


def alike(configs: Mapping[str, Mapping[str, Any]]) -> tuple[dict[str, str], list[str]]:
    """Return (the name of its group by run, sentences on how the runs are grouped if there are several groups).

    configs: configuration by run. A run without a configuration is a group of its own, since it cannot be compared.
    """
    members: dict[str, list[str]] = {}
    for name, config in configs.items():
        known = any(config.get(section) for section in DECISIVE)
        members.setdefault(
            json.dumps(_decisive(config), sort_keys=True, default=str) if known else f"alone {name}", []
        ).append(name)
    names = {
        key: runs[0] if len(runs) == 1 else f"{runs[0]} and {len(runs) - 1} like it" for key, runs in members.items()
    }
    groups = {run: names[key] for key, runs in members.items() for run in runs}
    return groups, list(_sentences(configs, list(members.values()))) if len(members) > 1 else []


def config_of(run: "Run") -> dict[str, Any]:
    """Return the configuration of a run; empty if it has none, as some runs written by other programs."""
    try:
        return run.config
    except StoreError:
        return {}


def _decisive(config: Mapping[str, Any]) -> dict[str, Any]:
    flat = flatten({section: config.get(section) or {} for section in DECISIVE})
    return {key: value for key, value in flat.items() if not key.startswith(FREE)}


def _sentences(configs: Mapping[str, Mapping[str, Any]], groups: list[list[str]]) -> Iterator[str]:
    first = _decisive(configs[groups[0][0]])
    for number, runs in enumerate(groups):
        own = _decisive(configs[runs[0]])
        keys = [key for key in dict.fromkeys([*first, *own]) if first.get(key) != own.get(key)]
        shown = ", ".join(keys[:4]) + (f" and {len(keys) - 4} more" if len(keys) > 4 else "")
        why = f": differs from {groups[0][0]} in {shown or 'what is not recorded'}" if number else ""
        together = "is by itself" if len(runs) == 1 else "are taken together as seeds of one configuration"
        yield f"{', '.join(runs)} {together}{why}"
