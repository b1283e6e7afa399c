"""A metric and a component of one's own: nothing in the package has to be touched.

In a YAML file beside this one (see examples/curvature.yaml):

    metrics:
      - metric_name: examples.curvature:tail_weight
        share: 0.05
        components: [{component_name: "examples.curvature:attention_update", layers: all}]

and then, from the folder that holds `examples/`:

    pico analyze examples/curvature.yaml --run runs/demo
"""

from picolm.address import Address


def tail_weight(x, *, share: float = 0.01) -> float:
    """The share of the squared norm that the largest entries (a fraction `share` of all) hold."""
    squares = x.flatten().square().sort(descending=True).values
    count = max(1, round(share * len(squares)))
    return (squares[:count].sum() / squares.sum()).item()


def attention_update(checkpoint, *, split, layers, model, **_):
    """What AdamW would do to each output projection, without its learning rate: first moment over the root of the second."""
    for layer in range(model["n_layers"]) if layers == "all" else layers:
        module = f"layers.{layer}.attention.o_proj"
        first, second = Address("exp_avg", "", module), Address("exp_avg_sq", "", module)
        if first in checkpoint and second in checkpoint:
            yield Address("update", "", module), checkpoint[first] / (checkpoint[second].sqrt() + 1e-8)
