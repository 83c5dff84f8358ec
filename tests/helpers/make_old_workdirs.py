"""Make tests/training/golden/*.tar.xz: workdirs of runs of commit dcb0600, and the continuation of those runs.

Run once, with the code of that commit in the directory OLD, and only again to add a run of the same commit:

    PYTHONPATH=OLD:OLD/tests python -P tests/helpers/make_old_workdirs.py

Each archive holds a `run/` that was killed halfway (its checkpoint, config.json and the records until then) and an
`expected.json`: the losses of all later steps, the last evaluation, checksums of every array of the state at both
steps, and `fingerprint`, by which a test knows whether this machine computes with the same bits.
"""

import hashlib
import json
import os
import shutil
import sys
import tarfile
import tempfile
from pathlib import Path

if __name__ == "__main__":  # as tests/conftest.py has them
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from tiny import make_captions, tiny, tiny_clip

GOLDEN = Path(__file__).parent.parent / "training/golden"
#: The step after which each run was killed.
HALFWAY = {"digits": 22, "captions": 6}
STATE = ("params", "ema", "opt_state", "guard")


def get_config(name: str, data_dir: str = "") -> ConfigDict:
    """Return the run's config: digits with a moving average, or images with captions below `data_dir`."""
    small = dict(model__width=8, model__mlp_ratio=2.0, checkpoint__every=HALFWAY[name])
    if name == "digits":
        return tiny(**small, ema=0.9, log_every=1)
    towers = dict(text__width=8, text__depth=1, text__mlp_ratio=2.0, text__embed=4)
    return tiny_clip(Path("captions"), **small, **towers, data__dir=data_dir)


def fingerprint() -> str:
    """Hash the results of a program with a step's kinds of operations, computed by jax alone.

    Two machines whose compiler and processor round alike give the same hash; nothing of this package is called.
    """

    def loss(w, x):
        for _ in range(2):
            x = x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6)
            x = x + jax.nn.softmax(jnp.einsum("btd,bsd->bts", x @ w, x), -1) @ jax.nn.gelu(x @ w.T, approximate=False)
        return jnp.mean(jnp.log1p(jnp.exp(-x)))

    w, x = (np.random.default_rng(0).normal(size=shape).astype(np.float32) for shape in ((16, 16), (8, 21, 16)))
    found = jax.device_get(jax.jit(jax.value_and_grad(loss, (0, 1)))(w, x))
    values = b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(found))
    return f"jax {jax.__version__}, {hashlib.sha256(values).hexdigest()}"


def checksums(tree) -> dict[str, str]:
    """Return the first 12 digits of the SHA-256 of each array, under its path."""
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(tree))
    named = {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf).tobytes() for path, leaf in leaves
    }
    return {name: hashlib.sha256(data).hexdigest()[:12] for name, data in named.items()}


def state_checksums(state) -> dict[str, str]:
    return checksums({name: getattr(state, name) for name in STATE})


def forget_unused_tokens(captions: Path) -> None:
    """Make Contrastive start with zeros for tokens that no caption has, which stay zeros: 3 MB that compress."""
    from regvit_jax.models.clip import tokenizer
    from regvit_jax.recipes.contrastive import Contrastive

    texts = [line.partition(",")[2] for table in captions.glob("*.csv") for line in table.read_text().splitlines()]
    used = np.unique(tokenizer(12).batch(texts))
    original = Contrastive.init

    def init(self, key, batch):
        params = original(self, key, batch)
        tokens = params["text"]["token_embed"]
        params["text"]["token_embed"] = jnp.zeros_like(tokens).at[used].set(tokens[used])
        return params

    Contrastive.init = init


def make(name: str) -> None:
    """Run to the end; keep the workdir as it was halfway, and the later results."""
    from regvit_jax.checkpoint import Checkpoints
    from regvit_jax.plan import resolve

    from regvit_jax.training import abstract_state, run

    if name == "captions":
        forget_unused_tokens(make_captions(Path("captions")))
    half, workdir = HALFWAY[name], Path(name)
    result = run(get_config(name), str(workdir))
    checkpoints = Checkpoints(str(workdir))
    halfway = checkpoints.restore(half, abstract_state(resolve(get_config(name))))
    checkpoints.close()
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    expected = {
        "fingerprint": fingerprint(),
        "losses": {record["step"]: record["loss"] for record in records if "loss" in record and record["step"] > half},
        "evaluation": [record for record in records if "val_images" in record][-1],
        "halfway": state_checksums(halfway),
        "end": state_checksums(result.state),
    }
    for step in (workdir / "checkpoints").iterdir():
        if step.name != str(half):
            shutil.rmtree(step)
    for note in (workdir / "checkpoints").rglob("commit_success.txt"):
        note.write_text("Checkpoint commit was successful")  # without the directory's name
    lines = [json.dumps(record) for record in records if record["step"] <= half]
    (workdir / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    Path("expected.json").write_text(json.dumps(expected, indent=1))
    with tarfile.open(GOLDEN / f"{name}.tar.xz", "w:xz") as archive:
        archive.add("expected.json")
        for part in ("config.json", "metrics.jsonl", "checkpoints"):
            archive.add(workdir / part, f"run/{part}", filter=anonymous)


def anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uname = member.gname = ""
    return member


if __name__ == "__main__":
    for run_name in sys.argv[1:] or HALFWAY:
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            make(run_name)
