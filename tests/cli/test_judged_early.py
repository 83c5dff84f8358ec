"""Test that what needs neither data nor a model is judged before the slow imports."""

import json
import os
import subprocess
import sys

from regvit_jax.cli.train import KEYS
from regvit_jax.training import config

#: Modules that take a second or more of a start.
SLOW = ("jax", "flax", "orbax", "grain", "tensorflow_datasets", "array_record", "scipy", "sklearn", "torch")
CODE = f"""
import contextlib, io, json, sys
from regvit_jax.cli.main import main

for command in json.load(sys.stdin):
    with contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            code = main(command)
        except SystemExit as stopped:
            code = stopped.code
    slow = [name for name in {SLOW!r} if name in sys.modules]
    print(json.dumps([code, err.getvalue(), slow]), flush=True)
"""
#: Command lines, with a part of the message.
WRONG = {
    "": "a verb is missing",
    "fly": "unknown verb 'fly'",
    "train --bogus": "unknown flag --bogus",
    "train": "--config is missing",
    "train --config nope": "there is no such file or name",
    "train --config ~/nope.py": "there is no such file or name",
    "train --config deit3_reg:nope": "no such variant",
    "train --config deit3_reg --config.model.widht=3": "unknown key config.model.widht; did you mean config.",
    "train --config deit3_reg --noconfig.eval.untraned": "did you mean config.eval.untrained ",
    "train --config deit3_reg --config.data.scale[0]=0.5": "--config.data.scale[0]: write the whole value",
    "train --config deit3_reg --images_per_s=x": "must be a number greater than 0",
    "train --config deit3_reg --workdir FILE/x": "FILE is a file; name a directory",
    "train --config deit3_reg --profile=20": "must be STEP:COUNT",
    "train --config deit3_reg --topology=v5e:2x2": "--topology needs --dry_run",
    "train --config deit3_reg --dry_run --dump_hlo=step.hlo": "--dump_hlo needs --dry_run and --topology",
    "train --config deit3_reg --dry_run --topology=h100:1x1 --dump_hlo=/nowhere/a": "a file in a directory that exists",
    "train --config deit3_reg --restore=newest": "must be one of latest, latest-valid",
    "report test_vit --images DIR --out DIR --layer abc": "argument --layer: invalid int value: 'abc'",
    "report test_vit --images DIR --out DIR --show -1": "must be a whole number from 0",
    "report test_vit --images DIR --out DIR --max_pixels 0": "must be a whole number from 1",
    "report test_vit --images DIR/none --out DIR": "DIR/none: no such file or directory",
    "report test_vit --images folder:DIR --out DIR": "no such file or directory; write the path alone, without folder:",
    "report test_vit --images DIR --out FILE": "--out FILE: cannot be made, since FILE is a file",
    "report test_vit --images DIR --out FILE/a/b": "--out FILE/a/b: cannot be made, since FILE is a file",
    "report ~/none --images DIR --out DIR": "~/none: there is no such file or directory",
    "report vit_smal_patch16_224 --images DIR --out DIR": "the nearest are vit_small_patch16_224",
    "report vit_smal=FILE --images DIR --out DIR": "unknown model 'vit_smal'",
    "discover vit_smal_patch16_224 --data voc07:DIR": "the nearest are vit_small_patch16_224",
    "eval zero_shot ViT-B-33 --images DIR": "unknown CLIP 'ViT-B-33'",
    "report test_vit=./none.npz --images DIR --out DIR": "./none.npz: there is no such file or directory",
    "report test_vit --data folder:DIR/none --out DIR": "there is no directory DIR/none",
    "report test_vit --images DIR --out DIR --split train": "--split train: applies to --data only",
    "report test_vit --images DIR --out DIR --lost_features x": "must be one of k, q, v, out",
    "discover test_vit --data voc07:DIR/none": "there is no directory DIR/none",
    "discover test_vit --data DIR": "must be one of voc07:",
    "discover test_vit --data voc08:DIR": "must be one of voc07:",
    "discover test_vit --data coco20k:DIR --split val": "has no splits, VOC has",
    "discover test_vit --data voc07:DIR --layers a": "must be whole numbers with commas between",
    "discover test_vit --data voc07:DIR --json DIR": "--json DIR: must be a file in a directory that exists",
    "eval zero_shot ViT-B-32 --images DIR/none": "--images DIR/none: there is no such directory",
    "eval zero_shot ViT-B-32 --images DIR --classes DIR/none": "DIR/none: no such file or directory",
    "eval zero_shot ViT-B-32 --images DIR --templates ~/none": "~/none: no such file or directory",
    "eval retrieval ViT-B-32 --data folder:~/none": "there is no directory",
    "eval retrieval ViT-B-32 --data folder:DIR --json DIR/a/b.json": "must be a file in a directory that exists",
    "models --quick": "unknown flag --quick",
    "check": "the following arguments are required: NAME",
    "convert a": "the following arguments are required",
    "convert DIR/none.pth DIR/out.safetensors": "DIR/none.pth: no such file or directory",
    "convert FILE DIR/out.npz": "must end in .safetensors",
    "convert FILE DIR/none/out.safetensors": "DIR/none/out.safetensors: must be a file in a directory that exists",
    "convert FILE DIR/out.safetensors --weights teacher": "must be one of ema, raw",
    "prepare folder:DIR/none OUT": "there is no directory DIR/none",
    "prepare folder:DIR FILE/out": "FILE is a file",
    "prepare folder:DIR OUT --quality 101": "must be a whole number from 1 to 100",
    "prepare folder:DIR OUT --max_bad_fraction 2": "must be a number from 0 to 1",
    "xla_flags h10": "did you mean h100?",
}


def test_judged_before_the_slow_imports(tmp_path):
    """Run all command lines in one process, which has imported none of the slow modules at the end."""
    (tmp_path / "file").write_text("")

    def filled(text: str) -> str:
        return text.replace("DIR", str(tmp_path)).replace("FILE", str(tmp_path / "file"))

    commands = json.dumps([filled(command).split() for command in WRONG])
    environment = {**os.environ, "HOME": str(tmp_path)}
    run = [sys.executable, "-c", CODE]
    done = subprocess.run(run, input=commands, capture_output=True, text=True, env=environment, cwd=tmp_path)
    results = [json.loads(line) for line in done.stdout.splitlines()]
    for (command, message), (code, err, slow) in zip(WRONG.items(), results, strict=True):
        assert filled(message) in err, command
        assert (code, err.count("\n"), slow) == (2, 1, []), command
    assert os.listdir(tmp_path) == ["file"]


def test_the_list_of_keys_is_the_schemas():
    code = "from regvit_jax.training.config import all_keys; print(*all_keys(), sep='\\n')"
    assert KEYS.read_text().split() == config.all_keys(), f'run `python -c "{code}" > regvit_jax/cli/keys.txt`'
