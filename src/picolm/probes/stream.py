"""What is measured of the residual stream of each layer: after a block under the name of the quantity and the layer of the block,
before the first block under the same name with `embedding_` before it.
"""

from collections.abc import Mapping

from picolm.probes.probe import Quantity


def of_the_stream(quantities: Mapping[str, Quantity]) -> dict[str, Quantity]:
    """Return quantities of the residual stream after each block, and beside each that of the stream before the first block."""
    found = {}
    for name, (units, definition) in quantities.items():
        found[name] = Quantity(units, f"{definition}; after this block")
        found[f"embedding_{name}"] = Quantity(units, f"{definition}; before the first block")
    return found


def place(name: str, blocks: int) -> tuple[str, int | None]:
    """Return the name and the layer of a quantity of the residual stream after so many blocks."""
    return (name, blocks - 1) if blocks else (f"embedding_{name}", None)
